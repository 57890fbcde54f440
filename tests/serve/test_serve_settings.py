"""`parsedec serve` from its words to the server's settings; what is wrong is said before a model is loaded."""

import asyncio
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import commands
from parsedec import __main__ as command
from parsedec.errors import ConfigError
from parsedec.serve.app import Gateway
from parsedec.serve.command import Server
from parsedec.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]


def composed(*overrides, config="serve"):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose(config, [*overrides])


def test_the_yaml_lists_every_setting_with_its_default():
    listed = OmegaConf.load(ROOT / "conf" / "serve.yaml").serve
    assert set(listed) - {"_target_"} == {field.name for field in dataclasses.fields(ServeSettings)}
    assert instantiate(composed().serve) == ServeSettings()


def test_load_is_a_server_and_its_clients():
    cfg = composed(config="load")
    assert cfg.serve.queue + cfg.serve.at_once >= cfg.clients  # so that none of them is refused


@pytest.mark.parametrize(
    "wrong", ["at_once=0", "queue=-1", "port=70000", "run=both", "api_key=secret", "max_request_bytes=1", "drain_s=-1"]
)
def test_values_that_cannot_be_are_refused(wrong):
    name, _, value = wrong.partition("=")
    with pytest.raises(Exception, match=rf"serve\.{name}") as error:
        instantiate(composed(f"serve.{wrong}").serve)
    assert isinstance(error.value.__cause__, ConfigError)
    assert name != "api_key" or value not in str(error.value.__cause__)


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PARSEDEC_API_KEY", " one,two ,")
    assert ServeSettings(api_key="env").keys == ("one", "two")
    assert ServeSettings().keys == ()
    monkeypatch.setenv("PARSEDEC_API_KEY", "")
    with pytest.raises(ConfigError, match="PARSEDEC_API_KEY"):
        _ = ServeSettings(api_key="env").keys


@pytest.mark.parametrize(
    ("host", "reached"),
    [("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("10.0.0.7", True), ("", True), ("some.host", True)],
)  # fmt: skip
def test_a_server_that_others_reach_without_a_key_is_known(host, reached):
    assert ServeSettings(host=host).unguarded is reached
    assert not ServeSettings(host=host, api_key="env").unguarded


def test_serving_without_a_key_is_warned_of_before_models_are_loaded(monkeypatch, capsys):
    served = pytest.importorskip("parsedec.serve.command", reason="the server is in the extra `server`")

    class LoadingBegan(Exception):
        pass

    def loading(cfg):
        raise LoadingBegan

    monkeypatch.setattr("parsedec.experiment.build.apply_runtime", loading)
    for host, said in (("0.0.0.0", True), ("127.0.0.1", False)):
        with pytest.raises(LoadingBegan):
            served.serve(composed(f"serve.host={host}"))
        assert ("serve.api_key=env" in capsys.readouterr().err) is said


def test_the_first_word_names_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parsedec"])
    command.main()
    assert "parsedec serve" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["parsedec", "serv"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "'serv'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["parsedec", "serve"])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "parsedec[server]" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "said"), [("serve.prot=1", "serve.port"), ("serve.api_key=env", "API_KEY")])
def test_a_mistake_ends_the_command_with_two(override, said, tmp_path):
    done = commands.run("-m parsedec", "serve", override, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # a server writes nothing


def test_who_asks_is_not_taken_from_a_header():
    """Fairness is between addresses where there are no keys, and anybody can write X-Forwarded-For."""
    slow = SimpleNamespace(stream=None)
    server = Server(Gateway(slow, ServeSettings()))
    try:
        assert (server.config.proxy_headers, server.config.ws) == (False, "none")
    finally:
        asyncio.run(server.gateway.desk.drain(0))
