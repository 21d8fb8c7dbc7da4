#include "ranks.h"

#include "memory.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

namespace optiq::cpu {
namespace {

// Ranks meet every millisecond or less, and waking up takes longer than a sum: who waits asks again
// and again for so long, then sleeps in the kernel.
constexpr auto kAwake = std::chrono::milliseconds(1);

// Two ranks send to each other at once. What is under way has to fit into the memory of a socket,
// or both would wait for the other to read.
constexpr size_t kUnderWay = 4096; // floats

#ifdef MSG_NOSIGNAL
constexpr int kNoSignal = MSG_NOSIGNAL;
#else
constexpr int kNoSignal = 0; // Python ignores SIGPIPE
#endif

[[noreturn]] void fail(const std::string& how) {
  throw std::runtime_error("the connection to another rank " + how);
}

// Calls `some` for what is left of `n` bytes until all are done.
template <class F>
void all(int connection, size_t n, short event, F&& some) {
  auto until = std::chrono::steady_clock::now() + kAwake;
  for (size_t done = 0; done < n;) {
    ssize_t now = some(done);
    if (now > 0) {
      done += now;
      until = std::chrono::steady_clock::now() + kAwake;
    } else if (now == 0) {
      fail("has ended");
    } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
      fail(std::string("is lost: ") + std::strerror(errno));
    } else if (std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    } else {
      pollfd waiting{connection, event, 0};
      poll(&waiting, 1, -1);
    }
  }
}

void send(int connection, const float* x, size_t n) {
  auto data = reinterpret_cast<const char*>(x);
  size_t bytes = n * sizeof(float);
  all(connection, bytes, POLLOUT, [=](size_t done) {
    return ::send(connection, data + done, bytes - done, kNoSignal | MSG_DONTWAIT);
  });
}

void receive(int connection, float* x, size_t n) {
  auto data = reinterpret_cast<char*>(x);
  size_t bytes = n * sizeof(float);
  all(connection, bytes, POLLIN,
      [=](size_t done) { return recv(connection, data + done, bytes - done, MSG_DONTWAIT); });
}

} // namespace

Ranks::Ranks(int rank, int size, const std::vector<int>& connections) : rank_(rank), size_(size) {
  if (rank < 0 || rank >= size || int(connections.size()) != (rank == 0 ? size - 1 : 1)) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                " has " + std::to_string(connections.size()) + " connections");
  }
  for (int connection : connections) {
    connections_.push_back(dup(connection));
    if (connections_.back() < 0) {
      fail(std::string("cannot be used: ") + std::strerror(errno));
    }
  }
}

Ranks::~Ranks() {
  for (int connection : connections_) {
    close(connection);
  }
}

void Ranks::total(float* x, size_t n) const {
  if (size_ == 2) { // each adds up by itself: one way less, and the order does not matter
    Buffer<float> part(std::min(n, kUnderWay));
    for (size_t i = 0; i < n; i += kUnderWay) {
      size_t some = std::min(kUnderWay, n - i);
      send(connections_[0], x + i, some);
      receive(connections_[0], part.get(), some);
      std::transform(x + i, x + i + some, part.get(), x + i, std::plus<>());
    }
    return;
  }
  if (rank_ != 0) {
    send(connections_[0], x, n);
    receive(connections_[0], x, n);
    return;
  }
  Buffer<float> part(n);
  for (int connection : connections_) {
    receive(connection, part.get(), n);
    std::transform(x, x + n, part.get(), x, std::plus<>());
  }
  for (int connection : connections_) {
    send(connection, x, n);
  }
}

void Ranks::side_by_side(const float* x, size_t rows, size_t width, float* y) const {
  if (rank_ != 0) {
    send(connections_[0], x, rows * width);
    receive(connections_[0], y, size_ * rows * width);
    return;
  }
  Buffer<float> part(rows * width);
  for (int rank = 0; rank < size_; rank++) {
    if (rank != 0) {
      receive(connections_[rank - 1], part.get(), rows * width);
    }
    const float* from = rank == 0 ? x : part.get();
    for (size_t row = 0; row < rows; row++) {
      std::copy_n(from + row * width, width, y + (row * size_ + rank) * width);
    }
  }
  for (int connection : connections_) {
    send(connection, y, size_ * rows * width);
  }
}

} // namespace optiq::cpu
