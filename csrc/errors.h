// Errors as sentences without source paths, and sizes computed with checks. Includes no torch header.
//
// Python sees std::runtime_error as RuntimeError and std::out_of_range as IndexError. csrc/tensors.h puts the
// operator's name before each.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace pspnet_fast {

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace pspnet_fast

#define PSP_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]  \
  throw std::runtime_error(::pspnet_fast::sentence(__VA_ARGS__))

// For values that name no class, where torch raises IndexError too.
#define PSP_CHECK_INDEX(condition, ...) \
  if (!(condition)) [[unlikely]]        \
  throw std::out_of_range(::pspnet_fast::sentence(__VA_ARGS__))

namespace pspnet_fast {

// Whether [first, first + count) lies in [0, size).
inline bool holds(int64_t size, int64_t first, int64_t count) {
  return first >= 0 && count >= 0 && first <= size && count <= size - first;
}

// "14400000000 bytes (13.41 GiB)"
inline std::string bytes_in_words(int64_t bytes) {
  double amount = static_cast<double>(bytes);
  int unit = 0;
  for (; amount >= 1024 && unit < 5; ++unit) amount /= 1024;
  std::ostringstream text;
  text.precision(2);
  text << bytes << " bytes";
  if (unit > 0) text << std::fixed << " (" << amount << " " << " KMGTP"[unit] << "iB)";
  return text.str();
}

// `purpose`: what the memory was for.
[[noreturn]] inline void throw_out_of_memory(bool cuda, int64_t bytes, const std::string& purpose) {
  throw std::runtime_error(sentence(cuda ? "CUDA out of memory" : "out of memory on the CPU", ": tried to allocate ",
                                    bytes_in_words(bytes), " for ", purpose));
}

}  // namespace pspnet_fast
