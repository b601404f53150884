// Runs the kernels of csrc/cuda/feature_alignment.h once, on the problem in the file argv[1], and
// writes sums and gradients to argv[2]. emulated.py writes and reads these files. With "far" instead
// of files, rows lie 2^31 elements apart.

#include "emulator.h"

#include <sys/mman.h>

#include "feature_kernels.h"
#include "problem_file.h"

using namespace fakd::cuda;

namespace {

void run(const std::vector<FeatureLine>& lines, const FeatureParams& all) {
  for (const FeatureParams& params : plan(lines, all)) {
    emulator::launch(align_rows, unsigned(params.blocks), THREADS, params);
    emulator::launch(sum_slots, unsigned(params.count), THREADS, params);
  }
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
  std::vector<float> near(2 * WIDTH), grads[2], sums(4), slots(4), gains{0.5f, 2.0f, 0.5f, 2.0f};
  for (int i = 0; i < 2 * WIDTH; ++i) {
    near[i] = far[i / WIDTH * FAR + i % WIDTH] = float(i * 7919 % 101) - 50;
  }
  std::vector<FeatureLine> lines(2);
  for (int pair = 0; pair < 2; ++pair) {
    grads[pair].resize(2 * WIDTH);
    FeatureLine& line = lines[pair];
    line = FeatureLine{};
    // Student against teacher, the one far where the other is near.
    line.student = pair == 0 ? far : near.data();
    line.teacher = pair == 0 ? near.data() + 1 : far + 1;
    line.student_stride = pair == 0 ? FAR : WIDTH;
    line.teacher_stride = pair == 0 ? WIDTH : FAR;
    line.grad = grads[pair].data();
    line.rows = 2;
    line.width = WIDTH - 1;
  }
  FeatureParams all{};
  all.coefficients = gains.data();
  all.slots = slots.data();
  all.sums = sums.data();
  all.eps = 1e-8f;
  run(lines, all);
  check(sums[0] > 0 && sums[0] == sums[2] && sums[1] == sums[3], "far rows have other sums");
  check(grads[0] == grads[1], "far rows have another gradient");
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
  Memory memory;
  const int64_t count = read_number(file);
  FeatureParams all{};
  all.is_squared = read_number(file) != 0;
  read(file, &all.eps, sizeof(all.eps));
  std::vector<FeatureLine> lines;
  std::vector<size_t> grad_bytes;
  for (int64_t pair = 0; pair < count; ++pair) {
    FeatureLine line{};
    line.rows = read_number(file);
    line.width = int32_t(read_number(file));
    const Tensor student = read_tensor(file, memory, line.rows, line.width);
    const Tensor teacher = read_tensor(file, memory, line.rows, line.width);
    line.student = student.data;
    line.student_dtype = student.dtype;
    line.student_stride = student.stride;
    line.teacher = teacher.data;
    line.teacher_dtype = teacher.dtype;
    line.teacher_stride = teacher.stride;
    if (read_number(file) != 0) {
      char* weights = memory.allocate(size_t(line.rows) * sizeof(float), 0);
      read(file, weights, size_t(line.rows) * sizeof(float));
      line.row_weights = reinterpret_cast<float*>(weights);
    }
    const int64_t grad_element = read_number(file);  // bytes; 0: no gradient is wanted
    const size_t offset = size_t(read_number(file));
    grad_bytes.push_back(size_t(line.rows * line.width * grad_element));
    if (grad_element != 0) line.grad = memory.allocate(grad_bytes.back(), offset);
    lines.push_back(line);
  }
  const size_t pairs_bytes = size_t(count) * 2 * sizeof(float);
  char* coefficients = memory.allocate(pairs_bytes, 0);
  read(file, coefficients, pairs_bytes);
  std::fclose(file);
  all.coefficients = reinterpret_cast<float*>(coefficients);
  all.sums = reinterpret_cast<float*>(memory.allocate(pairs_bytes, 0));
  all.slots =
      reinterpret_cast<float*>(memory.allocate(size_t(count_slots(lines)) * 2 * sizeof(float), 0));

  run(lines, all);

  file = std::fopen(arguments[2], "wb");
  check(file != nullptr, "the results cannot be written");
  std::fwrite(all.sums, 1, pairs_bytes, file);
  for (size_t pair = 0; pair < lines.size(); ++pair) {
    if (lines[pair].grad != nullptr) std::fwrite(lines[pair].grad, 1, grad_bytes[pair], file);
  }
  std::fclose(file);
}
