// Runs a kernel of csrc/cuda/projected_rows.h once, on the problem in the file argv[1], and writes
// its results to argv[2]. emulated_projected.py writes and reads these files. With "far" instead of
// files, rows of the teacher lie 2^31 elements apart.

#include "emulator.h"

#include <sys/mman.h>

#include "problem_file.h"
#include "projected_kernels.h"

using namespace fakd::cuda;

namespace {

void align(const std::vector<ProjectedLine>& lines, const ProjectedParams& all) {
  for (const ProjectedParams& params : plan(lines, all)) {
    const bool is_bfloat16 = params.lines[0].grad_dtype == Dtype::bfloat16;
    const auto kernel =
        is_bfloat16 ? align_projected_rows<__nv_bfloat16> : align_projected_rows<float>;
    emulator::launch(kernel, unsigned(params.blocks), THREADS, params);
  }
}

float* allocate_floats(Memory& memory, int64_t count) {
  return reinterpret_cast<float*>(memory.allocate(size_t(count) * sizeof(float), 0));
}

float* read_floats(std::FILE* file, Memory& memory, int64_t count) {
  float* floats = allocate_floats(memory, count);
  read(file, floats, size_t(count) * sizeof(float));
  return floats;
}

void run_align(std::FILE* file, std::FILE* out, Memory& memory) {
  const int64_t count = read_number(file);
  ProjectedParams all{};
  all.is_squared = read_number(file) != 0;
  read(file, &all.eps, sizeof(all.eps));
  const int64_t pairs = read_number(file);
  all.coefficients = read_floats(file, memory, 2 * pairs);
  std::vector<ProjectedLine> lines;
  for (int64_t entry = 0; entry < count; ++entry) {
    ProjectedLine line{};
    line.pair = int32_t(read_number(file));
    line.rows = int32_t(read_number(file));
    line.width = int32_t(read_number(file));
    const Tensor projected = read_tensor(file, memory, line.rows, line.width);
    const Tensor teacher = read_tensor(file, memory, line.rows, line.width);
    line.projected = reinterpret_cast<const float*>(projected.data);
    line.teacher = teacher.data;
    line.teacher_dtype = teacher.dtype;
    line.teacher_stride = teacher.stride;
    if (read_number(file) != 0) line.row_weights = read_floats(file, memory, line.rows);
    const int64_t grad_element = read_number(file);  // bytes; 0: no gradient is wanted
    const size_t offset = size_t(read_number(file));
    if (grad_element == 4) line.grad = projected.data;
    if (grad_element == 2) {
      line.grad = memory.allocate(size_t(line.rows) * line.width * 2, offset);
      line.grad_dtype = Dtype::bfloat16;
    }
    line.values = allocate_floats(memory, 2 * int64_t(line.rows));
    lines.push_back(line);
  }
  align(lines, all);
  for (const ProjectedLine& line : lines) {
    const size_t size = size_t(line.rows) * line.width;
    if (line.grad != nullptr) {
      std::fwrite(line.grad, line.grad_dtype == Dtype::bfloat16 ? 2 : 4, size, out);
    }
    std::fwrite(line.values, 2 * sizeof(float), size_t(line.rows), out);
  }
}

void run_sums(std::FILE* file, std::FILE* out, Memory& memory) {
  std::vector<ValueLine> lines(read_number(file));
  for (ValueLine& line : lines) {
    line.rows = read_number(file);
    line.values = read_floats(file, memory, 2 * line.rows);
    line.sums = allocate_floats(memory, 2);
  }
  for (const ValueLaunch& launch : plan(lines)) {
    emulator::launch(sum_row_values, launch.count, THREADS, launch.params);
  }
  for (const ValueLine& line : lines) std::fwrite(line.sums, sizeof(float), 2, out);
}

// Two rows far apart, of which nothing between is ever touched, must give what they give together.
void run_far() {
  constexpr int64_t FAR = int64_t(1) << 31;
  constexpr int32_t WIDTH = 100;
  constexpr size_t BYTES = size_t(FAR + WIDTH) * sizeof(float);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  check(memory != MAP_FAILED, "no addresses are left");
  float* far = static_cast<float*>(memory);
  std::vector<float> near(2 * WIDTH), projected[2], values[2], gains{0.5f, 2.0f};
  std::vector<ProjectedLine> lines(2);
  for (int i = 0; i < 2 * WIDTH; ++i) {
    near[i] = far[i / WIDTH * FAR + i % WIDTH] = float(i * 7919 % 101) - 50;
  }
  for (int entry = 0; entry < 2; ++entry) {
    projected[entry].resize(2 * WIDTH);
    for (int i = 0; i < 2 * WIDTH; ++i) projected[entry][i] = float(i * 104729 % 97) - 48;
    values[entry].resize(4);
    ProjectedLine& line = lines[entry];
    line.projected = projected[entry].data();
    line.grad = projected[entry].data();
    line.teacher = entry == 0 ? near.data() : far;
    line.teacher_stride = entry == 0 ? WIDTH : FAR;
    line.values = values[entry].data();
    line.rows = 2;
    line.width = WIDTH;
  }
  ProjectedParams all{};
  all.coefficients = gains.data();
  all.eps = 1e-8f;
  align(lines, all);
  check(values[0][2] > 0 && values[0] == values[1], "far rows have other values");
  check(projected[0] == projected[1], "far rows have another gradient");
}

}  // namespace

int main(int count_arguments, char** arguments) {
  if (count_arguments == 2 && std::strcmp(arguments[1], "far") == 0) {
    run_far();
    return 0;
  }
  check(count_arguments == 3, "two files must be given");
  std::FILE* file = std::fopen(arguments[1], "rb");
  check(file != nullptr, "the problem cannot be read");
  std::FILE* out = std::fopen(arguments[2], "wb");
  check(out != nullptr, "the results cannot be written");
  Memory memory;
  const bool is_sums = read_number(file) != 0;
  (is_sums ? run_sums : run_align)(file, out, memory);
  std::fclose(file);
  std::fclose(out);
}
