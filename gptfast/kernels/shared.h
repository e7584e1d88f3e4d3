// Memory that the ranks of one host share, in which they say numbers to each other round by round.
// A rank has two places for what it says, used in turn: it says round k when all others have begun
// round k - 1, and so are done with round k - 2. All ranks pass the same rounds.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "kernels.h"

namespace shared {

using packed::Number;

enum class Kind : int64_t { sum = 1, gather, broadcast };

class Memory {
 public:
  // Maps a file that is `file_bytes(size, piece_bytes)` long and was all zeros in the beginning.
  Memory(int file, int64_t rank, int64_t size, int64_t piece_bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  static int64_t file_bytes(int64_t size, int64_t piece_bytes);

  const int64_t rank, size, piece_bytes;  // piece_bytes: the most that is said in a round
  int64_t round = 0;                      // the latest one; one thread at a time passes rounds
  bool is_last;                           // whether the others had all mapped the file before
  void abort();                           // ends all waits, and those to come

  // What a rank says in a round.
  char* place(int64_t of_rank, int64_t in_round) const;
  // Until the place of a coming round may be written. False: there was an abort, as below.
  bool wait_for_place(int64_t coming) const;
  // Says what has been written to the own place. The first of several threads does it.
  void publish(int64_t in_round, Kind kind, int64_t bytes);
  // Until a rank has said the same kind and number of bytes as this one in its round.
  bool wait_for(int64_t of_rank, int64_t in_round, Kind kind, int64_t bytes) const;
  bool wait_for_all(int64_t in_round, Kind kind, int64_t bytes) const;
  // Of numbers first..first + count - 1 that the ranks have said: their sum in the order of ranks,
  // in float32, to `to`.
  void sum(int64_t in_round, Number type, int64_t first, int64_t count, void* to) const;
  // One round of one thread: RuntimeError after an abort.
  void exchange(Kind kind, const void* said, int64_t bytes);
  void check() const;  // RuntimeError after an abort

 private:
  struct Head;
  bool wait(const std::atomic<int64_t>& counter, int64_t value) const;
  Head* head;
  char* places;
};

// ValueError where there is none.
std::shared_ptr<Memory> memory_of(int64_t handle);

}  // namespace shared
