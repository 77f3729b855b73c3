// GDRCopy's library, opened at run time: a stand-in of it, none, and one that refuses.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "proxy/error.h"
#include "xla_ffi/cuda/gdr_window.h"
#include "xla_ffi/cuda/tests/beside.h"

namespace pplx::moe::cuda {
namespace {

const std::string kFake = testing::beside(PPLX_FAKE_GDRAPI);

struct Pages {
  // One page before what is mapped, so that a mapping may begin there.
  std::unique_ptr<std::byte[]> memory{new std::byte[4 * kGpuPage]()};
  std::byte* data =
      memory.get() + kGpuPage + (kGpuPage - reinterpret_cast<uintptr_t>(memory.get()) % kGpuPage) % kGpuPage;
};

class GdrCopyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    unsetenv("FAKE_GDR");
    setenv("PPLX_GDRCOPY", kFake.c_str(), 1);
  }
  void TearDown() override {
    unsetenv("FAKE_GDR");
    unsetenv("PPLX_GDRCOPY");
  }
  static std::string problem(std::byte* memory, size_t bytes) {
    try {
      const GdrWindow window(memory, bytes);
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  }
  // Drivers open, buffers pinned and mapped.
  static int in_use() {
    void* library = dlopen(kFake.c_str(), RTLD_NOW | RTLD_NOLOAD);
    const auto* count = library != nullptr ? static_cast<int*>(dlsym(library, "fake_gdr_in_use")) : nullptr;
    if (library != nullptr) dlclose(library);
    return count != nullptr ? *count : -1;
  }
  static void expect(const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "'";
  }
  Pages pages_;
};

TEST_F(GdrCopyTest, AMissingOneIsNamed) {
  setenv("PPLX_GDRCOPY", "/nowhere/libgdrapi.so", 1);
  expect(problem(pages_.data, kGpuPage), "/nowhere/libgdrapi.so");
  setenv("PPLX_GDRCOPY", "libc.so.6", 1);
  expect(problem(pages_.data, kGpuPage), "libc.so.6: not GDRCopy 2");
  // One that is found to be good is not looked at again.
  const auto copy =
      std::filesystem::temp_directory_path() / ("libgdrapi-" + std::to_string(getpid()) + ".so");
  std::filesystem::copy_file(kFake, copy, std::filesystem::copy_options::overwrite_existing);
  setenv("PPLX_GDRCOPY", copy.c_str(), 1);
  setenv("FAKE_GDR", "version 3", 1);
  expect(problem(pages_.data, kGpuPage), "of version 3.5, 2.x is needed");
  std::filesystem::remove(copy);
}

TEST_F(GdrCopyTest, WritesThroughTheMapping) {
  const GdrWindow window(pages_.data, 2 * kGpuPage);
  EXPECT_EQ(in_use(), 3);
  *window.at<uint64_t>(kGpuPage + 8) = 77;
  push_stores();
  EXPECT_EQ(*reinterpret_cast<uint64_t*>(pages_.data + kGpuPage + 8), 77U);
}

TEST_F(GdrCopyTest, AMappingMayBeginEarlier) {
  setenv("FAKE_GDR", "early", 1);
  const GdrWindow window(pages_.data, kGpuPage);
  *window.at<uint64_t>(16) = 5;
  EXPECT_EQ(*reinterpret_cast<uint64_t*>(pages_.data + 16), 5U);
}

TEST_F(GdrCopyTest, CanBeTurnedOff) {
  setenv("PPLX_GDRCOPY", "off", 1);
  EXPECT_EQ(problem(pages_.data, kGpuPage), "PPLX_GDRCOPY=off");
}

TEST_F(GdrCopyTest, EveryRefusalIsToldAndLeavesNothingBehind) {
  for (const auto& [how, says] :
       {std::pair("no driver", "gdrdrv"), std::pair("no pages", "pinning 65536 bytes"),
        std::pair("no mapping", "mapping 65536 bytes"), std::pair("short", "it mapped 32768 bytes")}) {
    setenv("FAKE_GDR", how, 1);
    const std::string text = problem(pages_.data, kGpuPage);
    expect(text, says);
    expect(text, kFake);
    unsetenv("FAKE_GDR");
    EXPECT_EQ(in_use(), 0) << "after " << how;
    EXPECT_EQ(problem(pages_.data, kGpuPage), "") << "after " << how;
    EXPECT_EQ(in_use(), 0);
  }
}

TEST_F(GdrCopyTest, WholePagesOnly) {
  expect(problem(pages_.data + 8, kGpuPage), "whole pages");
  expect(problem(pages_.data, 100), "whole pages");
  expect(problem(pages_.data, 0), "whole pages");
}

}  // namespace
}  // namespace pplx::moe::cuda
