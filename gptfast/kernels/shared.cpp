// The ops of shared_memory.py, which says what they mean.
#include "shared.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <torch/library.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "numbers.h"

namespace shared {

constexpr int64_t MOST_RANKS = 256, PAGE = 4096;

// What a rank has said: its latest round, and of its latest two the kind and size.
struct alignas(64) Said {
  std::atomic<int64_t> round, what[2];
  std::atomic<int64_t> is_here;
};

struct Memory::Head {
  alignas(64) std::atomic<int64_t> num_here;
  alignas(64) std::atomic<int64_t> has_ended;
  std::atomic<int64_t> disagree;
  Said said[MOST_RANKS];
};

namespace {

int64_t aligned(int64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

int64_t what(Kind kind, int64_t bytes) { return static_cast<int64_t>(kind) << 56 | bytes; }

// Waits a little, more the longer it has lasted: ranks may outnumber processors, and wait for
// minutes until somebody types.
void pause(int64_t turn) {
  constexpr int64_t SPINS = 256, YIELDS = 512, NANOSECONDS = 10'000, MOST = 4'000'000;
  if (turn < SPINS) {
    _mm_pause();
  } else if (turn < SPINS + YIELDS) {
    sched_yield();
  } else {
    const timespec nap{0, std::min(NANOSECONDS * (turn - SPINS - YIELDS + 1), MOST)};
    nanosleep(&nap, nullptr);
  }
}

}  // namespace

int64_t Memory::file_bytes(int64_t size, int64_t piece_bytes) {
  return aligned(sizeof(Head)) + 2 * size * aligned(piece_bytes);
}

Memory::Memory(int file, int64_t own, int64_t count, int64_t bytes)
    : rank(own), size(count), piece_bytes(aligned(bytes)) {
  TORCH_CHECK_VALUE(0 <= rank && rank < size && size <= MOST_RANKS, "rank ", rank, " of ", size,
                    " ranks has no place; at most ", MOST_RANKS, " have");
  void* start = mmap(nullptr, file_bytes(size, piece_bytes), PROT_READ | PROT_WRITE, MAP_SHARED,
                     file, 0);
  TORCH_CHECK(start != MAP_FAILED, "shared memory cannot be mapped: ", std::strerror(errno));
  head = static_cast<Head*>(start);
  places = static_cast<char*>(start) + aligned(sizeof(Head));
  if (head->said[rank].is_here.exchange(1)) {
    munmap(start, file_bytes(size, piece_bytes));
    TORCH_CHECK_VALUE(false, "rank ", rank, " has mapped this shared memory already");
  }
  is_last = head->num_here.fetch_add(1) + 1 == size;
}

Memory::~Memory() { munmap(head, file_bytes(size, piece_bytes)); }

void Memory::abort() { head->has_ended.store(1); }

char* Memory::place(int64_t of_rank, int64_t in_round) const {
  return places + (2 * of_rank + in_round % 2) * piece_bytes;
}

bool Memory::wait(const std::atomic<int64_t>& counter, int64_t value) const {
  for (int64_t turn = 0; counter.load(std::memory_order_acquire) < value; ++turn) {
    if (head->has_ended.load(std::memory_order_relaxed)) return false;
    pause(turn);
  }
  return true;
}

bool Memory::wait_for_place(int64_t coming) const {
  for (int64_t other = 0; other < size; ++other) {
    if (other != rank && !wait(head->said[other].round, coming - 1)) return false;
  }
  return true;
}

void Memory::publish(int64_t in_round, Kind kind, int64_t bytes) {
  Said& said = head->said[rank];
  int64_t before = in_round - 1;
  if (said.round.load(std::memory_order_relaxed) != before) return;
  said.what[in_round % 2].store(what(kind, bytes), std::memory_order_relaxed);
  said.round.compare_exchange_strong(before, in_round, std::memory_order_release);
}

bool Memory::wait_for(int64_t of_rank, int64_t in_round, Kind kind, int64_t bytes) const {
  const Said& said = head->said[of_rank];
  if (!wait(said.round, in_round)) return false;
  if (said.what[in_round % 2].load(std::memory_order_relaxed) == what(kind, bytes)) return true;
  head->disagree.store(1);
  head->has_ended.store(1);
  return false;
}

bool Memory::wait_for_all(int64_t in_round, Kind kind, int64_t bytes) const {
  for (int64_t other = 0; other < size; ++other) {
    if (!wait_for(other, in_round, kind, bytes)) return false;
  }
  return true;
}

void Memory::sum(int64_t in_round, Number type, int64_t first, int64_t count, void* to) const {
  using namespace step;
  const auto load = [&](int64_t of_rank, int64_t at, int64_t lanes) {
    const char* from = place(of_rank, in_round);
    if (type != Number::float16) return load_some(type, from, first + at, lanes);
    Floats v{};
    for (int64_t i = 0; i < lanes; ++i) {
      v[i] = _cvtsh_ss(reinterpret_cast<const uint16_t*>(from)[first + at + i]);
    }
    return v;
  };
  by_lanes(count, [&](int64_t at, int64_t lanes) {
    Floats total = load(0, at, lanes);
    for (int64_t other = 1; other < size; ++other) total += load(other, at, lanes);
    if (type != Number::float16) return store_some(type, to, at, lanes, total);
    for (int64_t i = 0; i < lanes; ++i) {
      static_cast<uint16_t*>(to)[at + i] = _cvtss_sh(total[i], _MM_FROUND_TO_NEAREST_INT);
    }
  });
}

void Memory::check() const {
  if (!head->has_ended.load()) return;
  TORCH_CHECK(!head->disagree.load(), "the ranks do not agree on what they say to each other");
  TORCH_CHECK(false, "another rank has ended");
}

void Memory::exchange(Kind kind, const void* said, int64_t bytes) {
  const int64_t coming = round + 1;
  if (wait_for_place(coming)) {
    const bool speaks = kind != Kind::broadcast || rank == 0;
    if (speaks) std::memcpy(place(rank, coming), said, bytes);
    publish(coming, kind, bytes);
    if (kind == Kind::broadcast) wait_for(0, coming, kind, bytes);
    else wait_for_all(coming, kind, bytes);
  }
  round = coming;
  check();
}

namespace {

using at::Tensor;

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<Memory>> memories;
int64_t next_handle = 0;

// Calls body(first, count) for pieces of `total` bytes.
template <class Body>
void by_pieces(const Memory& memory, int64_t total, const Body& body) {
  const int64_t most = memory.piece_bytes;
  for (int64_t at = 0; at < total; at += most) body(at, std::min(most, total - at));
}

Tensor all_reduce(const Tensor& x, int64_t handle) {
  const auto memory = memory_of(handle);
  const auto scalar = x.scalar_type();
  TORCH_CHECK_VALUE(scalar == at::kFloat || scalar == at::kBFloat16 || scalar == at::kHalf,
                    "numbers of type ", scalar,
                    " are not summed; float32, bfloat16 and float16 are");
  const Number type = scalar == at::kFloat  ? Number::float32
                      : scalar == at::kHalf ? Number::float16
                                            : Number::bfloat16;
  const Tensor from = x.contiguous(), y = at::empty(x.sizes(), x.options());
  const char* said = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t width = x.element_size();
  by_pieces(*memory, from.nbytes(), [&](int64_t at, int64_t bytes) {
    memory->exchange(Kind::sum, said + at, bytes);
    at::parallel_for(0, bytes / width, 1 << 14, [&](int64_t first, int64_t last) {
      memory->sum(memory->round, type, first, last - first, to + at + first * width);
    });
  });
  return y;
}

Tensor all_gather(const Tensor& x, int64_t handle) {
  const auto memory = memory_of(handle);
  auto shape = x.sizes().vec();
  shape.insert(shape.begin(), memory->size);
  const Tensor from = x.contiguous(), y = at::empty(shape, x.options());
  const char* said = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  by_pieces(*memory, from.nbytes(), [&](int64_t at, int64_t bytes) {
    memory->exchange(Kind::gather, said + at, bytes);
    for (int64_t other = 0; other < memory->size; ++other) {
      std::memcpy(to + other * from.nbytes() + at, memory->place(other, memory->round), bytes);
    }
  });
  return y;
}

Tensor broadcast(const Tensor& x, int64_t handle) {
  const auto memory = memory_of(handle);
  const Tensor from = x.contiguous(), y = at::empty(x.sizes(), x.options());
  const char* said = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  by_pieces(*memory, from.nbytes(), [&](int64_t at, int64_t bytes) {
    memory->exchange(Kind::broadcast, said + at, bytes);
    std::memcpy(to + at, memory->place(0, memory->round), bytes);
  });
  return y;
}

std::tuple<int64_t, bool> map_shared(int64_t file, int64_t rank, int64_t size,
                                     int64_t piece_bytes) {
  const auto memory = std::make_shared<Memory>(file, rank, size, piece_bytes);
  const std::lock_guard lock(mutex);
  memories[next_handle] = memory;
  return {next_handle++, memory->is_last};
}

void unmap_shared(int64_t handle) {
  const std::lock_guard lock(mutex);
  memories.erase(handle);
}

}  // namespace

std::shared_ptr<Memory> memory_of(int64_t handle) {
  const std::lock_guard lock(mutex);
  const auto found = memories.find(handle);
  TORCH_CHECK_VALUE(found != memories.end(), "there is no shared memory ", handle);
  return found->second;
}

}  // namespace shared

TORCH_LIBRARY_FRAGMENT(gptfast, m) {
  m.def("map_shared", shared::map_shared);
  m.def("unmap_shared", shared::unmap_shared);
  m.def("abort_shared", [](int64_t handle) { shared::memory_of(handle)->abort(); });
  m.def("shared_size", [](int64_t handle) { return shared::memory_of(handle)->size; });
  m.def("shared_file_bytes", shared::Memory::file_bytes);
}

TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("shared_all_reduce", shared::all_reduce);
  m.impl("shared_all_gather", shared::all_gather);
  m.impl("shared_broadcast", shared::broadcast);
}
