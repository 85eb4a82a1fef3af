// The class of the greatest logit at every pixel of an upsampled map, and its probability.
#include "columns.cuh"

namespace pspnet_fast::cuda {
namespace {

// One pixel, class by class: a running maximum, then, if asked for, the sum of exp(logit - greatest).
template <class T, class Class>
__device__ __forceinline__ void argmax_pixel(const UpsampleArgmaxArgs& args, int64_t n, int y, int x) {
  const Corners<T> corners(args, n, x, y);
  const int K = static_cast<int>(args.K);
  const int64_t to = (n * args.H + y) * args.W + x;
  acc_t<T> best, value[1];
  int found;
  bool careful = false;
  for (;;) {
    best = 0, found = -1;
    for (int k = 0; k < K; ++k) {
      corners.template at<1>(k, value, careful);
      // As in torch.argmax, the first of equals wins, and NaN is the greatest.
      if (found < 0 || (best == best && !(value[0] <= best))) {
        best = value[0];
        found = k;
      }
    }
    if (best == best || careful) break;
    careful = true;
  }
  static_cast<Class*>(args.classes)[to] = static_cast<Class>(found);

  if (args.confidence == nullptr) return;
  acc_t<T> sum = 0;
  for (int k = 0; k < K; ++k) {
    corners.template at<1>(k, value, careful);
    sum += exponential(value[0] - best);
  }
  static_cast<acc_t<T>*>(args.confidence)[to] = 1 / sum;
}

// Any size and dtype. A block takes a tile of pixels, a thread one pixel.
template <class T, class Class>
__global__ void __launch_bounds__(kThreads, 2) argmax_pixels(const __grid_constant__ UpsampleArgmaxArgs args) {
  const Pixel at = pixel_of_thread(static_cast<int>(args.H), static_cast<int>(args.W));
  if (at.x < args.W && at.y < args.H) argmax_pixel<T, Class>(args, at.n, at.y, at.x);
}

// The same up, in float. A block takes a strip of columns, a thread one column.
// Layout: logits of any strides.
// Traffic: classes and confidence written once; a block reads the logits around it once.
// Instructions a class and pixel, at 8 pixels a column: 5, and 5 a class to interpolate; in all 8 for K = 150.
template <class T, class Class>
__global__ void __launch_bounds__(kColumnThreads, kNewer ? 5 : 7)
    argmax_columns(const __grid_constant__ UpsampleArgmaxArgs args, ColumnShare share) {
  PixelColumn<T> column(args, share, false);
  if (column.count == 0) return;
  float best[kColumnPixels];
  int found[kColumnPixels];
#pragma unroll
  for (int i = 0; i < kColumnPixels; ++i) best[i] = -INFINITY, found[i] = 0;
  column.for_each_class(args, [&](int k, const auto& above, const auto& below) {
#pragma unroll
    for (int i = 0; i < kColumnPixels; ++i) {
      if (i % 2 == 0 && i >= column.count) break;
#pragma unroll
      for (int v = 0; v < kClassVector; ++v) {
        const float value = column.at(i, above[v], below[v]);
        if (value > best[i]) found[i] = k + v;
        best[i] = max(best[i], value);
      }
    }
  });

  const bool confident = args.confidence != nullptr;
  float sums[kColumnPixels] = {};
  if (confident) {
    column.for_each_class(args, [&](int, const auto& above, const auto& below) {
#pragma unroll
      for (int i = 0; i < kColumnPixels; ++i) {
        if (i % 2 == 0 && i >= column.count) break;
#pragma unroll
        for (int v = 0; v < kClassVector; ++v) {
          sums[i] += exp2_fast((column.at(i, above[v], below[v]) - best[i]) * kLog2E<float>);
        }
      }
    });
  }
  if (column.x >= args.W) return;
  const int64_t first = (int64_t{column.n} * args.H + column.top) * args.W + column.x;
  unsigned done = 0;
#pragma unroll
  for (int i = 0; i < kColumnPixels; ++i) {
    if (i >= column.count || !column.is_usual(best[i])) continue;
    static_cast<Class*>(args.classes)[first + i * args.W] = static_cast<Class>(found[i]);
    if (confident) static_cast<float*>(args.confidence)[first + i * args.W] = 1 / sums[i];
    done |= 1u << i;
  }
#pragma unroll 1
  for (int i = 0; i < column.count; ++i) {
    if (i >= kColumnPixels || (done >> i & 1) == 0) argmax_pixel<T, Class>(args, column.n, column.top + i, column.x);
  }
}

}  // namespace

int upsample_argmax(const UpsampleArgmaxArgs& args, void* stream) {
  if (!classes_fit_int(args)) return cudaErrorInvalidValue;
  const ColumnShare share = make_columns(args);
  return dispatch(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto byte) {
      using Class = decltype(byte);
      if constexpr (sizeof(T) < sizeof(double)) {
        if (share.across > 0) {
          return launch(argmax_columns<T, Class>, count_column_blocks(args, share), kColumnThreads, share.bytes(),
                        stream, args, share);
        }
      }
      return launch(argmax_pixels<T, Class>, count_tiles(args.N, args.H, args.W), dim3(kTileX, kTileY), 0, stream,
                    args);
    };
    return args.int_type == IntType::kUInt8 ? run(uint8_t{}) : run(int32_t{});
  });
}

}  // namespace pspnet_fast::cuda
