// layout.h against definitions that are obvious and slow.
#include "xla_ffi/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

#include "proxy/moe/wire.h"
#include "xla_ffi/registry.h"

namespace pplx::moe {
namespace {

TEST(Destinations, AreDistinctAndAscending) {
  std::mt19937 rng(1);
  for (int trial = 0; trial < 20000; ++trial) {
    const int top_k = 1 + static_cast<int>(rng() % kMaxTopK);
    const int per_rank = 1 + static_cast<int>(rng() % 5);
    std::vector<int32_t> home(top_k);
    std::set<int32_t> expected;
    for (int32_t& expert : home) {
      expert = static_cast<int32_t>(rng() % 40) - 2;  // kPastEnd, kNotRouted, 0..37
      if (expert >= 0) expected.insert(expert / per_rank);
    }
    std::vector<int32_t> ranks(kMaxTopK, -7);
    const int count = destinations(home.data(), top_k, per_rank, ranks.data());
    ranks.resize(count);
    ASSERT_EQ(ranks, std::vector<int32_t>(expected.begin(), expected.end()));
  }
}

TEST(LargestClip, EqualsBruteForce) {
  std::mt19937 rng(2);
  for (int trial = 0; trial < 20000; ++trial) {
    const int experts = 1 + static_cast<int>(rng() % 6);
    const int64_t alignment = std::vector<int64_t>{1, 1, 2, 3, 8}[rng() % 5];
    const int64_t rows = static_cast<int64_t>(rng() % 60);
    std::vector<int64_t> sizes(experts);
    for (int64_t& size : sizes) size = static_cast<int64_t>(rng() % 25);
    const int64_t most = *std::max_element(sizes.begin(), sizes.end());
    int64_t expected = 0;
    for (int64_t clip = 0; clip <= most; ++clip) {
      int64_t total = 0;
      for (const int64_t size : sizes) {
        int64_t padded = std::min(size, clip);
        while (padded % alignment != 0) ++padded;
        total += padded;
      }
      if (total <= rows) expected = clip;
    }
    ASSERT_EQ(largest_clip(sizes.data(), experts, alignment, rows, most), expected);
  }
}

TEST(MoeShape, EntriesAreBoundedByTheRanksExperts) {
  MoeShape shape;
  shape.top_k = 8;
  shape.experts_per_rank = 3;
  EXPECT_EQ(shape.entries(), 3);
  shape.experts_per_rank = 30;
  EXPECT_EQ(shape.entries(), 8);
}

TEST(MoeShape, RoundsCoverEveryTokenAndAreNeverNone) {
  MoeShape shape;
  for (shape.chunk = 1; shape.chunk < 9; ++shape.chunk) {
    EXPECT_EQ(shape.rounds(0), 1);
    for (int32_t tokens = 1; tokens < 40; ++tokens) {
      EXPECT_GE(shape.rounds(tokens) * shape.chunk, tokens);
      EXPECT_LT((shape.rounds(tokens) - 1) * shape.chunk, tokens);
    }
  }
}

TEST(MoeShape, PartsOfAMessageStayAligned) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (int32_t hidden = 1; hidden < 40; ++hidden) {
      for (int32_t top_k = 1; top_k <= kMaxTopK; ++top_k) {
        MoeShape shape;
        shape.dtype = dtype;
        shape.hidden = hidden;
        shape.top_k = top_k;
        shape.experts_per_rank = 1 + hidden % 7;
        for (const int64_t bytes : {shape.counts_bytes(), shape.slot_header_bytes(), shape.row_stride(),
                                    shape.dispatch_stride(), shape.dispatch_transpose_stride()}) {
          ASSERT_EQ(bytes % 16, 0);
        }
        ASSERT_GE(shape.slot_header_bytes(),
                  static_cast<int64_t>(sizeof(SlotHeader) + shape.entries() * sizeof(SlotEntry)));
        ASSERT_GE(shape.row_stride(), shape.row_bytes());
        ASSERT_GE(shape.counts_bytes(), 4 * shape.experts_per_rank);
      }
    }
  }
}

TEST(BufferSizes, ARegionHoldsTheLongestMessageOfEveryKind) {
  std::mt19937 rng(3);
  for (int trial = 0; trial < 2000; ++trial) {
    MoeShape shape;
    shape.num_ranks = 1 + static_cast<int32_t>(rng() % 9);
    shape.experts_per_rank = 1 + static_cast<int32_t>(rng() % 9);
    shape.top_k = 1 + static_cast<int32_t>(rng() % kMaxTopK);
    shape.hidden = 1 + static_cast<int32_t>(rng() % 100);
    shape.chunk = 1 + static_cast<int32_t>(rng() % 50);
    const BufferSizes sizes = buffer_sizes(shape);
    const auto header = static_cast<int64_t>(sizeof(RegionHeader));
    EXPECT_EQ(sizes.region_bytes % 64, 0U);
    EXPECT_EQ(sizes.staging_bytes % 64, 0U);
    EXPECT_GE(sizes.staging_bytes, sizes.region_bytes);
    for (const int64_t body :
         {shape.counts_bytes() + shape.chunk * shape.dispatch_stride(),
          shape.chunk * shape.dispatch_transpose_stride(), shape.chunk * shape.row_stride()}) {
      EXPECT_GE(static_cast<int64_t>(sizes.region_bytes), header + body);
    }
  }
}

TEST(Immediates, AreDistinctReservedAndNeverTheEnginesOwn) {
  std::set<uint32_t> lanes = {kClosedLane, kHeartbeatLane, kFailedLane};
  for (uint32_t lane = 0; lane < kMaxLanes; ++lane) lanes.insert(lane);
  EXPECT_EQ(lanes.size(), kMaxLanes + 3);
  std::set<uint32_t> seen;
  for (const uint32_t nonce : {1U, 2U, kMaxNonce - 1, kMaxNonce}) {
    for (const uint32_t source : {0U, 1U, kMaxRanks - 1}) {
      for (const uint32_t lane : lanes) {
        const uint32_t value = immediate(nonce, source, lane);
        EXPECT_TRUE(seen.insert(value).second);
        EXPECT_NE(value & kReservedImmediate, 0U);
        EXPECT_NE(value, ~0U);
      }
    }
  }
}

}  // namespace
}  // namespace pplx::moe
