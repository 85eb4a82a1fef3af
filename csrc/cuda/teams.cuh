// Planar maps: teams of threads that take a plane each, in units of neighbours that lie in one row.
#pragma once

#include <climits>
#include <initializer_list>

#include "common.cuh"

namespace pspnet_fast::cuda {

constexpr int kUnits = 4;  // of a plane that a thread has in flight

// Neighbours read, written and computed at once.
template <class T, int count>
struct alignas(count * sizeof(T)) Unit {
  T values[count];
};

template <class T, int count>
__device__ __forceinline__ Unit<T, count> load_unit(const T* from) {
  return *reinterpret_cast<const Unit<T, count>*>(from);
}

// By words: nvcc takes stores of computed values apart.
template <Memory memory = Memory::kDevice, class T, int count>
__device__ __forceinline__ void store_unit(T* to, const Unit<T, count>& unit) {
  if constexpr (sizeof(unit) == 16 && count > 1) {
    store<memory>(to, unit.values);
  } else if constexpr (sizeof(unit) == 8) {
    uint2 words;
    memcpy(&words, &unit, 8);
    *reinterpret_cast<uint2*>(to) = words;
  } else if constexpr (sizeof(unit) == 4) {
    unsigned word;
    memcpy(&word, &unit, 4);
    *reinterpret_cast<unsigned*>(to) = word;
  } else {
    *reinterpret_cast<Unit<T, count>*>(to) = unit;
  }
}

// Rows are summed in strips, every so many-th in one: as many as a warp takes at once. How many depends on the map
// alone, so that results do not depend on the threads.
inline int strips_of(int64_t H, int64_t W) { return static_cast<int>(std::clamp<int64_t>(kWarp * 4 / W, 1, H)); }

// The elements of a unit: 4, 2 or 1, at most 16 bytes, that begin on a boundary of their size in every row of the
// images; 0 if a plane's elements cannot be counted in int.
template <class T>
int unit_of(int64_t H, int64_t W, std::initializer_list<Image> images) {
  const int64_t ahead = int64_t{kUnits} * strips_of(H, W);  // rows that a thread may count beyond the last
  int count = std::min(kVector<T>, 4);
  for (const Image& image : images) {
    if (image.data == nullptr) continue;
    if (image.stride_h < 0 || (H + ahead) * image.stride_h + W > INT_MAX) return 0;
    const auto fits = [&](int64_t stride) { return stride % count == 0; };
    while (count > 1 && !(fits(W) && fits(image.stride_n) && fits(image.stride_c) && (fits(image.stride_h) || H == 1) &&
                          reinterpret_cast<uintptr_t>(image.data) % (count * sizeof(T)) == 0)) {
      count /= 2;
    }
  }
  return count;
}

// Calls f with the elements of a unit as a constant.
template <class T, class F>
cudaError_t dispatch_unit(int unit, F f) {
  if constexpr (kVector<T> >= 4) {
    if (unit == 4) return f(std::integral_constant<int, 4>{});
  }
  return unit == 2 ? f(std::integral_constant<int, 2>{}) : f(std::integral_constant<int, 1>{});
}

// A block is `count` teams of a warp, or one team; each takes `planes` planes, one after the other.
struct Teams {
  int threads, count, planes;
  size_t bytes;  // of shared memory a block; 0: a block has not enough

  dim3 block() const { return dim3(threads, count); }
  int64_t blocks(int64_t total) const { return divide_up(total, int64_t{count} * planes); }
};

// Many planes: a warp each, whose tables a block makes once for several. Few: as many threads as the GPU can hold.
// `block_bytes(planes)` are those of the tables of a block that takes so many, `team_bytes` those of a team.
template <class F>
Teams make_teams(int64_t total, size_t team_bytes, F block_bytes) {
  constexpr int kTeams = kThreads / kWarp, kMostPlanes = 8;
  constexpr int64_t kBlocks = 1024, kResident = 1 << 17;  // blocks, at least; threads
  if (total * kWarp >= kResident) {
    const auto planes = static_cast<int>(std::clamp<int64_t>(total / (kBlocks * kTeams), 1, kMostPlanes));
    const size_t bytes = block_bytes(kTeams * planes) + kTeams * team_bytes;
    if (bytes <= kSharedBytes) return {kWarp, kTeams, planes, bytes};
  }
  const size_t bytes = block_bytes(1) + team_bytes;
  int threads = 2 * kWarp;
  while (threads < kThreads && (total * threads < kResident || bytes > kSharedBytes / 4)) threads *= 2;
  return {threads, 1, 1, bytes <= kSharedBytes ? bytes : 0};
}

// A thread's place in its team.
struct Member {
  int threads, rank, team, teams;

  __device__ __forceinline__ Member()
      : threads(static_cast<int>(blockDim.x)),
        rank(static_cast<int>(threadIdx.x)),
        team(static_cast<int>(threadIdx.y)),
        teams(static_cast<int>(blockDim.y)) {}
  __device__ __forceinline__ int block_threads() const { return threads * teams; }
  __device__ __forceinline__ int block_rank() const { return team * threads + rank; }
  // Of the team's threads; teams are a warp where there are several.
  __device__ __forceinline__ void sync() const {
    if (teams > 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  // The team's `turn`-th plane, and its block's first: a block's are neighbours.
  __device__ __forceinline__ int64_t plane(int turn, int turns) const {
    return first_plane(turns) + turn * teams + team;
  }
  __device__ __forceinline__ int64_t first_plane(int turns) const {
    return static_cast<int64_t>(blockIdx.x) * turns * teams;
  }
};

// A thread's units of a plane: every `threads`-th, row by row.
struct UnitWalk {
  int units, step_y, step_x, y, x;  // of a row; x in units

  __device__ __forceinline__ UnitWalk(const Member& member, int units)
      : units(units),
        step_y(member.threads / units),
        step_x(member.threads - step_y * units),
        y(member.rank / units),
        x(member.rank - y * units) {}
  __device__ __forceinline__ void advance() {
    x += step_x;
    y += step_y;
    if (x >= units) x -= units, ++y;
  }
};

}  // namespace pspnet_fast::cuda
