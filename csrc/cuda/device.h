#pragma once

#include <string>
#include <utility>

namespace dlmone::cuda {

// Version of the runtime that is linked in, for example 13000; 0 if it cannot be asked.
int runtime_version();

// Number of usable devices and, when there is none, the runtime's own words for why.
std::pair<int, std::string> device_count();

}  // namespace dlmone::cuda
