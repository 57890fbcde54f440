"""Text to ids from many threads: how control tokens are read is the caller's choice, not that of whoever came last."""

from concurrent.futures import ThreadPoolExecutor

from parsedec import load

SPELT = "<|user|>What is 2 + 2?<|end|>"


def test_threads_do_not_change_how_others_read_control_tokens():
    model = load("zoo:target", dtype="float32", device="cpu")
    wanted = {plain: model.encode(SPELT, plain=plain) for plain in (False, True)}
    whole = model.encode(SPELT, whole=True)
    assert len(wanted[False]) < len(wanted[True]), "the text holds control tokens"

    def read(i):
        if i % 3 == 2:
            return model.encode(SPELT, whole=True) == whole
        return model.encode(SPELT, plain=bool(i % 3)) == wanted[bool(i % 3)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))
