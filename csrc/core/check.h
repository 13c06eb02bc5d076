#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tmac {

// Throws std::invalid_argument with the parts streamed together unless `ok`.
template <typename... Parts>
void check_argument(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace tmac
