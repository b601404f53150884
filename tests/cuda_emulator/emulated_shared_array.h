// The emulator's shared memory. Every word remembers who wrote and read it since the last barrier.
#pragma once

namespace fakd::cuda {

template <class T, int COUNT>
class SharedArray {
 public:
  class Word {
   public:
    Word(SharedArray& array, int index) : array_(array), index_(index) {}
    operator T() const { return array_.read(index_); }
    Word& operator=(T value) {
      array_.write(index_, value);
      return *this;
    }
    Word& operator=(const Word& other) { return *this = T(other); }
    Word& operator+=(T value) { return *this = T(*this) + value; }

   private:
    SharedArray& array_;
    int index_;
  };

  Word operator[](int index) {
    if (index < 0 || index >= COUNT) {
      emulator::fail("bounds: index %d of a shared array of %d", index, COUNT);
    }
    return Word(*this, index);
  }

 private:
  struct Access {
    int thread;
    uint64_t barriers, warp_barriers;
  };
  struct Record {
    T value;
    int block = 0;  // the last that wrote it
    std::vector<Access> writers, readers;  // since the last barrier of the block
  };

  static Access now() {
    const auto& machine = emulator::machine;
    const int thread = machine.current;
    return {thread, machine.barriers, machine.warp_barriers[thread / emulator::WARP]};
  }

  static void check(const std::vector<Access>& before, const Access& self, int index, bool writes) {
    for (const Access& other : before) {
      if (other.thread == self.thread) continue;
      const bool is_same_warp = other.thread / emulator::WARP == self.thread / emulator::WARP;
      if (is_same_warp && other.warp_barriers != self.warp_barriers) continue;
      emulator::fail(
          "race in block %u: thread %d %s word %d of shared memory, which thread %d has touched "
          "with no barrier between", blockIdx.x, self.thread, writes ? "writes" : "reads", index,
          other.thread);
    }
  }

  static void forget(std::vector<Access>& accesses, const Access& self) {
    if (!accesses.empty() && accesses.back().barriers != self.barriers) accesses.clear();
  }

  T read(int index) {
    Record& record = records_[index];
    const Access self = now();
    forget(record.writers, self);
    forget(record.readers, self);
    if (record.block != emulator::machine.blocks) {
      emulator::machine.suspect = [thread = self.thread, index] {
        emulator::fail("unwritten: thread %d reads word %d of shared memory", thread, index);
      };
    }
    check(record.writers, self, index, false);
    record.readers.push_back(self);
    return record.value;
  }

  void write(int index, T value) {
    Record& record = records_[index];
    const Access self = now();
    forget(record.writers, self);
    forget(record.readers, self);
    check(record.writers, self, index, true);
    check(record.readers, self, index, true);
    record.writers.push_back(self);
    record.value = value;
    record.block = emulator::machine.blocks;
  }

  Record records_[COUNT];
};

}  // namespace fakd::cuda
