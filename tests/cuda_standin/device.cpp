// A CUDA device whose memory is the host's, for a torch that was built without CUDA.
//
// Tensors on it are tensors of their own device: torch asks for the same placement, generators and pinned memory as on a
// GPU, and what mixes devices is refused. What is computed is computed by the CPU's kernels on the same memory.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

const Device CUDA(DeviceType::CUDA, 0);
const Device CPU(DeviceType::CPU);
thread_local int64_t stream = 0;

bool ours(const Tensor& t) { return t.defined() && t.device().type() == DeviceType::CUDA; }

struct Memory final : c10::Allocator {
  static void drop(void* p) { std::free(p); }

  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    if (p) std::memset(p, 0xFF, n);  // what was never written is no number
    return {p, p, &drop, CUDA};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} memory;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CUDA; }
  Device getDevice() const override { return CUDA; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::UNSAFE, CUDA, stream); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = getStream(CUDA);
    stream = next.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
} guard;
c10::impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, &guard);

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(uint64_t seed) : at::CPUGeneratorImpl(seed) { device_ = CUDA; }
  void be(Device device) { device_ = device; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return CUDA; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  bool isPinnedPtr(const void*) const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Generator>(0); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<Generator>(0);
    return generator;
  }
};

// Tensors of the device as the CPU sees them during one operation, and what it made as tensors of the device.
class Views {
 public:
  Tensor host(const Tensor& t) {
    if (!ours(t)) return t;
    for (const auto& pair : pairs_)
      if (pair.device.is_same(t)) return pair.host;
    const auto storage = t.storage();
    auto found = hosts_.find(storage.unsafeGetStorageImpl());
    if (found == hosts_.end()) {
      c10::DataPtr same(storage.mutable_data(), nullptr, [](void*) {}, CPU);
      const auto alias = of_size(storage.nbytes(), std::move(same), c10::GetAllocator(DeviceType::CPU));
      found = hosts_.emplace(storage.unsafeGetStorageImpl(), alias).first;
      devices_.emplace(alias.unsafeGetStorageImpl(), storage);
    }
    auto h = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), DispatchKeySet(DispatchKey::CPU), t.dtype());
    h.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    pairs_.push_back({t, h});
    return h;
  }

  Tensor device(const Tensor& h) {
    if (!h.defined() || h.device() != CPU) return h;
    for (auto& pair : pairs_)
      if (pair.host.is_same(h)) return pair.device;
    const auto storage = h.storage();
    auto found = devices_.find(storage.unsafeGetStorageImpl());
    if (found == devices_.end()) found = devices_.emplace(storage.unsafeGetStorageImpl(), moved(storage)).first;
    auto d = made(found->second, h.dtype());
    d.unsafeGetTensorImpl()->set_sizes_and_strides(h.sizes(), h.strides(), h.storage_offset());
    return d;
  }

  // What was written to may have another size now, and then lies elsewhere.
  void settle() {
    for (auto& [d, h] : pairs_) {
      if (h.storage().data() != d.storage().data()) {
        const auto size = h.storage().nbytes();
        auto fresh = memory.allocate(size);
        std::memcpy(fresh.get(), h.storage().data(), size);
        d.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
        d.storage().unsafeGetStorageImpl()->set_nbytes(size);
      }
      if (d.sizes() != h.sizes() || d.strides() != h.strides() || d.storage_offset() != h.storage_offset())
        d.unsafeGetTensorImpl()->set_sizes_and_strides(h.sizes(), h.strides(), h.storage_offset());
    }
  }

 private:
  struct Pair {
    Tensor device, host;
  };

  static c10::Storage of_size(size_t bytes, c10::DataPtr data, c10::Allocator* allocator) {
    return {c10::Storage::use_byte_size_t{}, bytes, std::move(data), allocator, true};
  }

  static c10::Storage moved(const c10::Storage& storage) {
    auto* kept = new c10::Storage(storage);
    c10::DataPtr same(kept->mutable_data(), kept, [](void* p) { delete static_cast<c10::Storage*>(p); }, CUDA);
    return of_size(kept->nbytes(), std::move(same), &memory);
  }

  Tensor made(c10::Storage storage, caffe2::TypeMeta dtype) const {
    for (const auto& pair : pairs_)
      if (pair.device.storage().unsafeGetStorageImpl() == storage.unsafeGetStorageImpl())  // a view of that one
        return at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, std::move(storage), pair.device.key_set(), dtype);
    return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA), dtype);
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts_, devices_;  // each by the other
  std::vector<Pair> pairs_;
};

// Indices may be on the host.
const std::unordered_set<std::string> MIXED = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

bool on_device(const c10::IValue& value) {
  if (value.isTensor()) return ours(value.toTensor());
  if (value.isDevice()) return value.toDevice().is_cuda();
  if (!value.isTensorList()) return false;
  for (const Tensor& t : value.toTensorVector())
    if (ours(t)) return true;
  return false;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  Views views;
  bool any = false;
  for (size_t i = first; i < stack->size(); ++i) any |= on_device((*stack)[i]);
  const bool strict = any && !MIXED.count(schema.name());
  const auto host = [&](const Tensor& t) {
    TORCH_CHECK(
        !strict || !t.defined() || ours(t) || t.dim() == 0,
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
        t.device().str(), "! (", schema.name(), ")");
    return views.host(t);
  };
  std::vector<Generator*> generators;
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(host(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::optional<Tensor>(host(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      value = CPU;
    } else if (value.isGenerator()) {
      auto* generator = dynamic_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(
          generator || !any, "Expected a 'cuda' device type for generator but found 'cpu' (", schema.name(), ")");
      if (generator) generators.push_back(generator);
    }
  }
  struct Lent {  // to the CPU, which takes its own alone
    std::vector<Generator*>& all;
    explicit Lent(std::vector<Generator*>& all) : all(all) {
      for (auto* one : all) one->be(CPU);
    }
    ~Lent() {
      for (auto* one : all) one->be(CUDA);
    }
  } lent(generators);
  op.callBoxed(stack);
  views.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = views.device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(views.device(t));
      value = list;
    }
  }
}

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<Device>;
using Pinned = std::optional<bool>;

Tensor empty(c10::SymIntArrayRef size, Dtype dtype, Layout, Place, Pinned, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, Dtype dtype, Layout, Place, Pinned) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, DispatchKeySet(DispatchKey::CUDA),
      c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  Views views;
  views.host(self).copy_(views.host(from));
  return self;
}

Tensor& set_(Tensor& self, c10::Storage from, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(from));
  tensor->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

}  // namespace

namespace at {
using Hooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("set_.source_Storage_storage_offset", &set_);
}

PYBIND11_MODULE(cuda_standin_device, m) {
  c10::SetAllocator(DeviceType::CUDA, &memory);
  m.def("stream", [] { return stream; });
  m.def("set_stream", [](int64_t id) { stream = id; });
}
