// What the sanitizers report about libfabric itself: memory that the provider "net" of 1.17 never frees, and
// synchronisation in code that was not built for ThreadSanitizer.
// Visible, as the sanitizers' libraries look these up in the program.
#pragma GCC visibility push(default)
extern "C" {
const char* __lsan_default_suppressions();
const char* __lsan_default_suppressions() { return "leak:libfabric"; }

const char* __tsan_default_suppressions();
const char* __tsan_default_suppressions() {
  return "called_from_lib:libfabric.so\n"
         "race:libfabric.so\n"
         "mutex:libfabric.so\n"
         "mutex:_dl_call_fini\n"  // as libfabric is unloaded
         "mutex:ld-linux\n"       // the same where the loader has no symbols
         "deadlock:libfabric.so\n"
         // An exception's reference count is libstdc++'s, which is not built for it either.
         "race:std::__exception_ptr::exception_ptr::_M_release\n"
         "race:std::runtime_error::~runtime_error\n";
}
}
#pragma GCC visibility pop
