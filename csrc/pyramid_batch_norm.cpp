// Binds pyramid_batch_norm and its backward to the kernels.
#include "tensors.h"

namespace pspnet_fast {
namespace {

// One dense tensor [R] a level, or none at all, in the dtype of the first of them all.
struct LevelTensors {
  std::vector<Tensor> tensors;

  LevelTensors(const char* name, const std::vector<Tensor>& given, const Levels& levels, int64_t R, const Tensor& like,
               const Tensor& reduced) {
    PSP_CHECK(given.empty() || static_cast<int>(given.size()) == levels.count, name,
              " must list one tensor a level, or none");
    for (const Tensor& tensor : given) {
      check_like(name, tensor, {R}, like);
      PSP_CHECK(tensor.device() == reduced.device(), name, " must be on the device of reduced");
      tensors.push_back(dense(tensor));
    }
  }
  void* operator[](int level) const { return tensors.empty() ? nullptr : tensors[level].data_ptr(); }
};

void check_reduced(const Tensor& reduced, const Levels& levels) {
  PSP_CHECK(reduced.dim() == 3 && reduced.size(1) == levels.first[levels.count] && reduced.size(2) > 0 &&
                reduced.size(2) <= INT_MAX,
            "reduced must be (N, cells of bins, R), R from 1 to ", INT_MAX);
}

void read_batch(const std::vector<int64_t>& batch, const Levels& levels, bool* to) {
  PSP_CHECK(static_cast<int>(batch.size()) == levels.count, "batch must list one flag a level");
  for (int l = 0; l < levels.count; ++l) to[l] = batch[l] != 0;
}

DType norm_dtype_of(const Tensor& norm, const Tensor& reduced) {
  const DType dtype = dtype_of(norm);
  PSP_CHECK(dtype == dtype_of(reduced) || dtype == DType::kFloat32,
            "the norms must be float32 or have the dtype of reduced");
  return dtype;
}

// The running statistics of levels in training are written to in place, each by one level.
void check_running(const std::vector<Tensor>& means, const std::vector<Tensor>& variances, const bool* batch,
                   const Tensor& reduced, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  std::vector<Region> written, others{region_of(reduced)};
  for (const auto* tensors : {&weights, &biases}) {
    for (const Tensor& tensor : *tensors) others.push_back(region_of(tensor));
  }
  for (const auto* tensors : {&means, &variances}) {
    for (size_t l = 0; l < tensors->size(); ++l) {
      const Tensor& tensor = (*tensors)[l];
      PSP_CHECK(!batch[l] || tensor.is_contiguous(), "running statistics must be contiguous: they are written to");
      (batch[l] ? written : others).push_back(region_of(tensor));
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    const auto touches = [&](const Region& other) { return overlap(other, written[i]); };
    PSP_CHECK(std::none_of(others.begin(), others.end(), touches) &&
                  std::none_of(written.begin(), written.begin() + static_cast<ptrdiff_t>(i), touches),
              "unsupported operation: running statistics, which are written to, share memory with another argument: "
              "clone() one of them first");
  }
}

std::tuple<Tensor, Tensor> pyramid_batch_norm(const Tensor& reduced, std::vector<Tensor> weights,
                                              std::vector<Tensor> biases, std::vector<Tensor> running_means,
                                              std::vector<Tensor> running_vars, std::vector<int64_t> batch,
                                              std::vector<double> momentum, std::vector<double> eps, bool relu,
                                              std::vector<int64_t> bins) {
  const Levels levels = levels_of(bins);
  check_reduced(reduced, levels);
  const int64_t N = reduced.size(0), R = reduced.size(2);
  const Tensor like = !weights.empty() ? weights[0] : !running_means.empty() ? running_means[0] : reduced;
  PyramidBatchNormArgs args{dtype_of(reduced), norm_dtype_of(like, reduced), N, R, levels};
  PSP_CHECK(weights.size() == biases.size() && running_means.size() == running_vars.size(),
            "weights and biases, running_means and running_vars must list as many tensors as each other");
  PSP_CHECK(momentum.size() == batch.size() && eps.size() == batch.size(),
            "momentum and eps must list one number a level");
  read_batch(batch, levels, args.batch);
  const LevelTensors weight("weights", weights, levels, R, like, reduced);
  const LevelTensors bias("biases", biases, levels, R, like, reduced);
  const LevelTensors mean("running_means", running_means, levels, R, like, reduced);
  const LevelTensors variance("running_vars", running_vars, levels, R, like, reduced);
  check_running(running_means, running_vars, args.batch, reduced, weights, biases);
  for (int l = 0; l < levels.count; ++l) {
    PSP_CHECK(args.batch[l] || mean[l] != nullptr, "a level has neither statistics of its batch nor running ones");
    PSP_CHECK(!args.batch[l] || N * (levels.first[l + 1] - levels.first[l]) != 1,
              "a level has one value a channel, of which there are no statistics");
    args.weight[l] = weight[l], args.bias[l] = bias[l];
    args.running_mean[l] = mean[l], args.running_var[l] = variance[l];
    args.momentum[l] = momentum[l], args.eps[l] = eps[l];
  }
  args.relu = relu;
  const Tensor output = new_tensor(reduced, {N, reduced.size(1), R});
  Tensor statistics = new_tensor(reduced, {2, levels.count, R}, accumulate_type(reduced));
  if (N == 0) return {output, torch::stable::zero_(statistics)};
  const Tensor dense_reduced = dense(reduced);
  args.reduced = dense_reduced.data_ptr();
  args.output = output.data_ptr();
  args.statistics = statistics.data_ptr();
  PSP_LAUNCH(pyramid_batch_norm, reduced, args);
  return {output, statistics};
}

std::tuple<Tensor, Tensor> pyramid_batch_norm_backward(const Tensor& grad_output, const Tensor& reduced,
                                                       std::optional<Tensor> output, std::vector<Tensor> weights,
                                                       const Tensor& statistics, std::vector<int64_t> batch,
                                                       std::vector<double> eps, std::vector<int64_t> bins) {
  const Levels levels = levels_of(bins);
  check_reduced(reduced, levels);
  const int64_t N = reduced.size(0), P = reduced.size(1), R = reduced.size(2);
  const Tensor like = !weights.empty() ? weights[0] : reduced;
  PyramidBatchNormBackwardArgs args{dtype_of(reduced), norm_dtype_of(like, reduced), N, R, levels};
  read_batch(batch, levels, args.batch);
  PSP_CHECK(eps.size() == batch.size(), "eps must list one number a level");
  check_like("grad_output", grad_output, {N, P, R}, reduced);
  const LevelTensors weight("weights", weights, levels, R, like, reduced);
  for (int l = 0; l < levels.count; ++l) args.weight[l] = weight[l];
  const auto sizes = statistics.sizes();
  PSP_CHECK(sizes.size() == 3 && sizes[0] == 2 && sizes[1] == levels.count && sizes[2] == R &&
                statistics.scalar_type() == accumulate_type(reduced) && statistics.device() == reduced.device(),
            "statistics must be what pyramid_batch_norm has given for reduced");
  const Tensor grad_reduced = new_tensor(reduced, {N, P, R});
  Tensor grad_affine = new_tensor(like, {2, levels.count, R});
  Tensor dense_output;
  if (output) {
    check_like("output", *output, {N, P, R}, reduced);
    dense_output = dense(*output);
    args.output = dense_output.data_ptr();
  }
  if (N == 0) return {grad_reduced, torch::stable::zero_(grad_affine)};
  const Tensor dense_grad = dense(grad_output), dense_reduced = dense(reduced), dense_statistics = dense(statistics);
  args.grad_output = dense_grad.data_ptr();
  args.reduced = dense_reduced.data_ptr();
  args.statistics = dense_statistics.data_ptr();
  args.grad_reduced = grad_reduced.data_ptr();
  args.grad_affine = grad_affine.data_ptr();
  PSP_LAUNCH(pyramid_batch_norm_backward, reduced, args);
  return {grad_reduced, grad_affine};
}

}  // namespace

PSP_KERNELS(m) {
  PSP_IMPL(m, "pyramid_batch_norm", pyramid_batch_norm);
  PSP_IMPL(m, "pyramid_batch_norm_backward", pyramid_batch_norm_backward);
}

}  // namespace pspnet_fast
