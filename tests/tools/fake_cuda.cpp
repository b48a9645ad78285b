// A CUDA device guard that does nothing: what FakeTensorMode lacks in a torch built without CUDA.
//
// There, slicing, expand or copy_ of a fake CUDA tensor raises "PyTorch is not linked with support
// for cuda devices", because each op first asks for the guard of its device. Fake tensors have no
// memory and start no kernels, so a guard with one device and one stream is enough for them.
// tests/tools/fake_cuda.py builds and loads this file.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

class FakeCudaGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}

  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
};

}  // namespace

// Functions rather than C10_REGISTER_GUARD_IMPL, so that a test can take the guard out again.
extern "C" void fake_cuda_install() {
  static const FakeCudaGuard* guard = new FakeCudaGuard();  // c10 wants guards to outlive it
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, guard);
}

extern "C" void fake_cuda_remove() {
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, nullptr);
}
