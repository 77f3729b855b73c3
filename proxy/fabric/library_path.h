// Where else to look for run-time libraries.
#pragma once

#include <string>
#include <vector>

namespace pplx {

// Folders searched for libfabric after the system's own, in order (Python wheels carry copies under mangled
// names: any file lib*fabric*.so* there will do).
void set_library_search_path(std::vector<std::string> folders);

// Of the libfabric that engines use; loads it, throws kFabric.
struct LibraryInfo {
  std::string path, version;
};
LibraryInfo libfabric_info();

}  // namespace pplx
