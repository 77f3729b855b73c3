// What a step gave against what it must give.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "xla_ffi/tests/oracle.h"

namespace pplx::moe::testing {

// Bit for bit.
inline void expect_equal(const Outputs& got, const Outputs& want, const std::string& where) {
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * 4) == 0);
  };
  EXPECT_EQ(got.ok, want.ok) << where;
  EXPECT_EQ(got.num_rows, want.num_rows) << where;
  EXPECT_EQ(got.num_dropped, want.num_dropped) << where;
  EXPECT_EQ(got.group_sizes, want.group_sizes) << where;
  EXPECT_TRUE(got.quantized == want.quantized) << where;
  EXPECT_TRUE(got.tokens == want.tokens) << where;
  EXPECT_TRUE(same(got.row_weights, want.row_weights)) << where;
  EXPECT_TRUE(got.out == want.out) << where;
  EXPECT_TRUE(got.d_y == want.d_y) << where;
  EXPECT_TRUE(same(got.d_row_weights, want.d_row_weights)) << where;
  EXPECT_TRUE(got.d_x == want.d_x) << where;
  EXPECT_TRUE(same(got.d_weights, want.d_weights)) << where;
}

}  // namespace pplx::moe::testing
