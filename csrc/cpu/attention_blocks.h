// How attention alignment is cut: tasks of some heads, and their blocks of query rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "attention_heads.h"
#include "attention_kl.h"

namespace fakd {

// The score blocks of both sides. Most of a private cache of 2 MiB is worth 2 to 5 % where a library
// packs keys and queries anew for every block; our products take none of its time with less.
inline int64_t score_bytes() { return are_products_packed() ? 3 << 18 : 5 << 18; }
constexpr int64_t LEAST_ROWS = 16, MOST_ROWS = 256;  // of a block; fewer make slow products

// What the query rows of one split of a task give the keys that they meet.
struct KeyPartial {
  Scratch grad;  // [units, count of the range, K]
  KeyRange keys = {0, 0};
};

struct HeadsTask {
  int64_t pair, batch;
  int64_t first_unit, units;  // student key heads
  int64_t split, splits;      // of the query rows
  double* sums;               // [H] of the pair
  KeyPartial* partial;        // where query rows are split, and keys have a gradient
};

// How a pair is cut into blocks; depends on its sizes alone.
struct Blocks {
  int64_t units;  // student key heads of a task
  int64_t rows;   // query rows of a block
  int64_t stride;

  Blocks(const AttentionPair& pair, bool is_mean, int64_t tokens) {
    const int64_t key_heads = std::max<int64_t>(1, pair.student_k.heads);
    const int64_t group = pair.student_q.heads / key_heads;
    stride = (tokens + 31) / 16 * 16;
    const int64_t row_bytes = stride * int64_t(sizeof(float));
    const int64_t heads = is_mean ? pair.student_q.heads + pair.teacher_q.heads : 2 * group;
    const int64_t affordable = score_bytes() / (row_bytes * std::max<int64_t>(1, heads));
    // Blocks of equal size: a short last one would waste its products.
    const int64_t most = std::clamp(affordable, LEAST_ROWS, MOST_ROWS);
    const int64_t count = std::max<int64_t>(1, (tokens + most - 1) / most);
    // Whole tiles of products.
    const int64_t step = are_tiled(pair.student_q.dtype, pair.student_k.dtype) ? 2 * TILE : 8;
    rows = ((tokens + count - 1) / count + step - 1) / step * step;
    rows = std::max<int64_t>(1, std::min(tokens, rows));
    const int64_t most_units = std::clamp<int64_t>(affordable / rows, 1, key_heads);
    const int64_t tasks = (key_heads + most_units - 1) / most_units;
    units = is_mean ? key_heads : (key_heads + tasks - 1) / tasks;
  }
};

inline std::vector<KeyUnit> student_units(const AttentionPair& pair, const HeadsTask& task) {
  const int64_t group = pair.group();
  std::vector<KeyUnit> units(task.units);
  for (int64_t unit = 0; unit < task.units; ++unit) {
    units[unit].key_head = task.first_unit + unit;
    units[unit].query_heads.resize(group);
    std::iota(
        units[unit].query_heads.begin(), units[unit].query_heads.end(),
        units[unit].key_head * group);
  }
  return units;
}

// All heads, or those that the student's are compared with, in the student's order: as many units
// as the student's where the heads of each unit share a key head here too, else one for every head.
inline std::vector<KeyUnit> teacher_units(
    const AttentionPair& pair, const std::vector<KeyUnit>& of_student) {
  const int64_t group = pair.teacher_q.heads / pair.teacher_k.heads;
  std::vector<KeyUnit> whole, single;
  if (pair.teacher_heads == nullptr) {
    for (int64_t key_head = 0; key_head < pair.teacher_k.heads; ++key_head) {
      whole.push_back({key_head, std::vector<int64_t>(group)});
      std::iota(whole.back().query_heads.begin(), whole.back().query_heads.end(), key_head * group);
    }
    return whole;
  }
  bool is_shared = true;
  for (const KeyUnit& unit : of_student) {
    whole.push_back({-1, {}});
    for (int64_t head : unit.query_heads) {
      const int64_t teacher_head = pair.teacher_heads[head];
      single.push_back({teacher_head / group, {teacher_head}});
      KeyUnit& last = whole.back();
      is_shared = is_shared && (last.key_head < 0 || last.key_head == teacher_head / group);
      last.key_head = teacher_head / group;
      last.query_heads.push_back(teacher_head);
    }
  }
  return is_shared ? whole : single;
}

}  // namespace fakd
