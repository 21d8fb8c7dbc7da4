// How an op refuses its arguments.
#pragma once

#include <sstream>
#include <stdexcept>

namespace optiq {

/** Throws std::invalid_argument("[op] ...") of the parts, each as it is streamed. */
template <class... Parts>
[[noreturn]] void fail(const char* op, Parts&&... parts) {
  std::ostringstream msg;
  msg << "[" << op << "] ";
  (msg << ... << parts);
  throw std::invalid_argument(msg.str());
}

} // namespace optiq
