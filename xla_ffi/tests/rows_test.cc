// rows.h: rounding against exact arithmetic, order of sums.
#include "xla_ffi/rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "xla_ffi/quantize.h"
#include "xla_ffi/tests/oracle.h"

namespace pplx::moe {
namespace {

using testing::round_to_bfloat16;

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
uint16_t rounded(float value) { return from_float<BFloat16>(value).bits; }
constexpr const float* kNoStart = nullptr;

TEST(BFloat16, EveryValueSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = to_float(BFloat16{static_cast<uint16_t>(bits)});
    const uint16_t back = rounded(value);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(BFloat16{back})));
      EXPECT_EQ(back, bits | 0x40U);
    } else {
      EXPECT_EQ(back, bits);
    }
  }
}

// At, just below and just above the midpoint after every value, and next to the value itself.
TEST(BFloat16, RoundsToNearestEven) {
  for (uint32_t high = 0; high < 65536; ++high) {
    for (const uint32_t low : {0x0000U, 0x0001U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU}) {
      const float value = from_bits(high << 16 | low);
      if (std::isnan(value)) {
        const uint16_t quiet = rounded(value);
        ASSERT_TRUE(std::isnan(to_float(BFloat16{quiet}))) << std::hex << high << ' ' << low;
        ASSERT_EQ(quiet >> 15, high >> 15);
        continue;
      }
      ASSERT_EQ(rounded(value), round_to_bfloat16(value)) << std::hex << high << ' ' << low;
    }
  }
}

TEST(BFloat16, InfinitiesAndOverflow) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(rounded(infinity), 0x7f80);
  EXPECT_EQ(rounded(-infinity), 0xff80);
  EXPECT_EQ(rounded(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(rounded(from_bits(0x7f800001)), 0x7fc0);  // a NaN whose payload lies in the lower half only
}

TEST(Float16, EveryValueSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = to_float(Float16{half});
    const uint16_t back = from_float<Float16>(value).bits;
    if ((bits & 0x7fffU) > 0x7c00U) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(to_float(Float16{back})));
      continue;
    }
    EXPECT_EQ(value, static_cast<float>(testing::decode_float16(half)));
    EXPECT_EQ(back, half);
  }
}

// The midpoint after every value and its neighbours, where every value is exact in float32.
TEST(Float16, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7c00U; ++bits) {
    const auto low = static_cast<float>(testing::decode_float16(static_cast<uint16_t>(bits)));
    const double step =
        bits == 0x7bffU ? 32.0 : testing::decode_float16(static_cast<uint16_t>(bits + 1)) - low;
    const auto middle = static_cast<float>(low + step / 2);
    for (const float value : {low, std::nextafter(middle, 0.0F), middle, std::nextafter(middle, 1e9F)}) {
      for (const float sign : {1.0F, -1.0F}) {
        ASSERT_EQ(from_float<Float16>(sign * value).bits, testing::round_to_float16(sign * value))
            << sign * value;
      }
    }
  }
  EXPECT_EQ(from_float<Float16>(65519.9F).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.0F).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(-std::numeric_limits<float>::infinity()).bits, 0xfc00);
  EXPECT_EQ(from_float<Float16>(std::numeric_limits<float>::denorm_min()).bits, 0);
}

TEST(E4m3, RoundsToNearestEvenAndSaturates) {
  for (uint32_t byte = 0; byte < 0x7fU; ++byte) {
    const auto low = static_cast<float>(testing::decode_e4m3(static_cast<uint8_t>(byte)));
    const double step = byte == 0x7eU ? 32.0 : testing::decode_e4m3(static_cast<uint8_t>(byte + 1)) - low;
    const auto middle = static_cast<float>(low + step / 2);
    for (const float value : {low, std::nextafter(middle, 0.0F), middle, std::nextafter(middle, 1e9F)}) {
      for (const float sign : {1.0F, -1.0F}) {
        ASSERT_EQ(to_e4m3(sign * value), testing::round_to_e4m3(sign * value)) << sign * value;
      }
    }
  }
  EXPECT_EQ(to_e4m3(1e30F), 0x7e);
  EXPECT_EQ(to_e4m3(-std::numeric_limits<float>::infinity()), 0xfe);
  EXPECT_EQ(to_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, kNanE4m3);
}

// A block's largest value becomes at most 448, and no smaller power of two would do.
TEST(Quantize, ScalesFitTheirBlocks) {
  std::mt19937 rng(3);
  std::uniform_real_distribution<float> exponent(-110, 127);
  for (int i = 0; i < 20000; ++i) {
    const float max = i < 300 ? std::ldexp(1.75F, i / 2 - 100) * (i % 2 == 0 ? 1.0F : 1.0000001F)
                              : std::exp2(exponent(rng));
    const float used = std::max(max, kSmallestMax);
    const Scale power = block_scale(max, Quant::kFp8Ue8m0);
    const double scale = std::ldexp(1.0, power.exponent - 127);
    ASSERT_LE(used, 448 * scale) << max;
    ASSERT_GT(used, 224 * scale) << max;
    ASSERT_EQ(power.inverse, static_cast<float>(1 / scale)) << max;
    const Scale plain = block_scale(max, Quant::kFp8);
    ASSERT_EQ(plain.value, used / 448.0F);
    ASSERT_EQ(plain.inverse, 448.0F / used);
  }
}

TEST(Quantize, ABlockWithoutFiniteMaximumIsNan) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> row(300, 1.0F);
    row[130] = bad;
    std::vector<uint8_t> out(300);
    std::vector<std::byte> scales(12);
    quantize_row(out.data(), scales.data(), row.data(), 300, Quant::kFp8);
    for (int h = 0; h < 300; ++h) EXPECT_EQ(out[h], h / 128 == 1 ? kNanE4m3 : 0x7e) << h;
  }
}

TEST(SumRows, StartsFromTheFirstTermAndGoesInOrder) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  for (const int64_t hidden : {1, 15, 16, 255, 256, 257, 700}) {
    for (int n = 1; n <= 16; ++n) {
      std::vector<std::vector<float>> rows(n, std::vector<float>(hidden));
      std::vector<const float*> pointers;
      std::vector<float> weights(n);
      for (int i = 0; i < n; ++i) {
        for (float& value : rows[i]) value = normal(rng) * std::exp(4 * normal(rng));
        weights[i] = normal(rng);
        pointers.push_back(rows[i].data());
      }
      std::vector<float> plain(hidden), weighted(hidden);
      sum_rows(plain.data(), kNoStart, pointers.data(), nullptr, n, hidden);
      sum_rows(weighted.data(), kNoStart, pointers.data(), weights.data(), n, hidden);
      for (int64_t h = 0; h < hidden; ++h) {
        volatile float sum = rows[0][h], product = weights[0] * rows[0][h];
        volatile float weighted_sum = product;
        for (int i = 1; i < n; ++i) {
          sum = sum + rows[i][h];
          product = weights[i] * rows[i][h];
          weighted_sum = weighted_sum + product;
        }
        ASSERT_EQ(plain[h], sum);
        ASSERT_EQ(weighted[h], weighted_sum);
      }
    }
  }
}

// Negative zero and NaN payloads: a single unweighted term is a copy.
TEST(SumRows, OneTermIsACopy) {
  const std::vector<float> row = {-0.0F, from_bits(0x7f800001), 1.0F};
  const float* rows[] = {row.data()};
  std::vector<float> out(3);
  sum_rows(out.data(), kNoStart, rows, nullptr, 1, 3);
  EXPECT_EQ(std::memcmp(out.data(), row.data(), 12), 0);
  std::vector<float> in_place = row;
  const float* self[] = {in_place.data()};
  sum_rows(in_place.data(), kNoStart, self, nullptr, 1, 3);
  EXPECT_EQ(std::memcmp(in_place.data(), row.data(), 12), 0);
}

TEST(DotRows, IsTheSameSixteenPartialSumsEverywhere) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  for (int64_t hidden = 1; hidden < 80; ++hidden) {
    std::vector<float> a(hidden), b(hidden);
    for (float& value : a) value = normal(rng);
    for (float& value : b) value = normal(rng);
    ASSERT_EQ(dot_rows(a.data(), b.data(), hidden), testing::reference_dot(a, b)) << hidden;
    double exact = 0;
    for (int64_t h = 0; h < hidden; ++h) exact += double{a[h]} * b[h];
    ASSERT_NEAR(dot_rows(a.data(), b.data(), hidden), exact, 1e-4);
  }
}

}  // namespace
}  // namespace pplx::moe
