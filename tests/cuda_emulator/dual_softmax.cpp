// Runs the kernels of csrc/cuda/dual_softmax.h once, on the problem in the file argv[1], and writes
// to argv[2] what they fill. emulated_outputs.py writes and reads these files.

#include "emulator.h"

#include "dual_softmax_kernels.h"
#include "problem_file.h"

using namespace fakd::cuda;

namespace {

enum class Task : int64_t { logits, scores, probabilities, sums };

template <Kind KIND>
void launch_rows(const ScoreParams& params, Distance distance) {
  const auto launch = [&](void (*kernel)(const ScoreParams)) {
    emulator::launch(kernel, unsigned(params.blocks), THREADS, params);
  };
  switch (distance) {
    case Distance::kl: return launch(score_rows<Distance::kl, KIND>);
    case Distance::reverse_kl: return launch(score_rows<Distance::reverse_kl, KIND>);
    case Distance::jsd: return launch(score_rows<Distance::jsd, KIND>);
    case Distance::mse:
      if constexpr (KIND != Kind::logits) launch(score_rows<Distance::mse, KIND>);
  }
}

void run(const std::vector<ScoreLine>& lines, const ScoreParams& all, Distance distance,
         Task task) {
  for (const ScoreParams& params : plan(lines, all)) {
    if (task == Task::logits) launch_rows<Kind::logits>(params, distance);
    if (task == Task::scores) launch_rows<Kind::scores>(params, distance);
    if (task == Task::probabilities) launch_rows<Kind::probabilities>(params, distance);
    if (task == Task::sums) emulator::launch(sum_rows<2>, unsigned(params.count), THREADS, params);
    else if (task != Task::logits) {
      emulator::launch(sum_rows<1>, unsigned(params.count), THREADS, params);
    }
  }
}

struct Span {
  char* data;
  size_t bytes;
};

struct Problem {
  Memory memory;
  ScoreParams all{};
  Distance distance;
  Task task;
  std::vector<ScoreLine> lines;
  std::vector<Span> results;  // in the order in which they are written

  template <class T>
  T* read_array(std::FILE* file, size_t count) {
    char* data = memory.allocate(count * sizeof(T), 0);
    read(file, data, count * sizeof(T));
    return reinterpret_cast<T*>(data);
  }

  template <class T>
  T* read_optional(std::FILE* file, size_t count) {
    return read_number(file) != 0 ? read_array<T>(file, count) : nullptr;
  }

  float* make_result(size_t count) {
    results.push_back({memory.allocate(count * sizeof(float), 0), count * sizeof(float)});
    return reinterpret_cast<float*>(results.back().data);
  }

  // With all that lies between its rows, at the same place relative to 16 bytes.
  MapRows read_rows(std::FILE* file, bool is_result = false) {
    MapRows rows{};
    rows.dtype = Dtype(read_number(file));
    rows.batch_stride = read_number(file);
    rows.head_stride = read_number(file);
    rows.row_stride = read_number(file);
    const size_t offset = size_t(read_number(file)), bytes = size_t(read_number(file));
    rows.data = memory.allocate(bytes, offset);
    read(file, rows.data, bytes);
    if (is_result) results.push_back({static_cast<char*>(rows.data), bytes});
    return rows;
  }

  // A gradient may be absent, or take the student's place.
  void read_both(std::FILE* file, MapPair& pair) {
    const int64_t gradient = read_number(file);
    pair.student = read_rows(file, gradient == 2);
    pair.teacher = read_rows(file);
    if (gradient == 1) pair.grad = read_rows(file, true);
    if (gradient == 2) pair.grad = pair.student;
  }

  void read_pair(std::FILE* file) {
    MapPair pair{};
    pair.batch = read_number(file);
    pair.heads = read_number(file);
    pair.tokens = int32_t(read_number(file));
    const int32_t width = int32_t(read_number(file));
    pair.is_causal = read_number(file) != 0;
    pair.window = read_number(file);
    read_both(file, pair);
    const bool is_map = task != Task::logits;
    const size_t rows = size_t(pair.batch * pair.tokens);
    pair.row_weights = read_optional<float>(file, rows);
    pair.teacher_heads = read_array<int64_t>(file, size_t(pair.heads));
    pair.coefficient = read_array<float>(file, is_map ? 1 : 2);
    const size_t values = size_t(pair.heads) * rows;
    if (is_map) {
      pair.values = reinterpret_cast<float*>(memory.allocate(values * sizeof(float), 0));
      pair.sums = make_result(size_t(pair.heads));
    } else {
      pair.values = make_result(2 * values);
    }
    append_lines(pair, lines);
    if (!is_map) lines.back().width = width;
  }

  void read_sums(std::FILE* file) {
    ScoreLine line{};
    line.rows = line.width = 1;
    line.rows = read_number(file);
    line.values = read_array<float>(file, size_t(2 * line.rows));
    line.row_weights = read_optional<float>(file, size_t(line.rows));
    line.sums = make_result(2);
    lines.push_back(line);
  }

  explicit Problem(std::FILE* file) {
    task = Task(read_number(file));
    if (task == Task::sums) {
      read_sums(file);
      return;
    }
    distance = Distance(read_number(file));
    float numbers[3];
    read(file, numbers, sizeof(numbers));
    all.inverse_temperature = numbers[0];
    all.student.softcap = numbers[1];
    all.teacher.softcap = numbers[2];
    double beta;
    read(file, &beta, sizeof(beta));
    all.mixture = fakd::mixture_of(beta);
    const size_t rows = size_t(read_number(file)), width = size_t(read_number(file));
    all.student.bias = read_optional<float>(file, width);
    all.teacher.bias = read_optional<float>(file, width);
    all.labels = read_optional<int64_t>(file, rows);
    for (int64_t count = read_number(file); count > 0; --count) read_pair(file);
  }
};

}  // namespace

int main(int count_arguments, char** arguments) {
  check(count_arguments == 3, "two files must be given");
  std::FILE* file = std::fopen(arguments[1], "rb");
  check(file != nullptr, "the problem cannot be read");
  Problem problem(file);
  std::fclose(file);

  run(problem.lines, problem.all, problem.distance, problem.task);

  file = std::fopen(arguments[2], "wb");
  check(file != nullptr, "the results cannot be written");
  for (const Span& result : problem.results) std::fwrite(result.data, 1, result.bytes, file);
  std::fclose(file);
}
