// Counters of user values come and go; see RequestTest and EngineTest for what they count.
#include <random>
#include <unordered_map>

#include "proxy/engine/imm_table.h"
#include "proxy/tests/support.h"

namespace pplx::testing {
namespace {

TEST(Immediates, ATableHoldsWhatWasNotErased) {
  std::mt19937 rng(1);
  for (uint32_t range : {40U, 3000U, 0xFFFFFFFFU}) {
    ImmTable table;
    std::unordered_map<uint32_t, std::shared_ptr<ImmState>> model;
    std::vector<uint32_t> values;
    for (int step = 0; step < 20000; ++step) {
      if (values.size() < 1000 && rng() % 2 == 0) values.push_back(rng() % range);
      if (values.empty()) continue;
      const uint32_t imm = values[rng() % values.size()];
      if (model.erase(imm) != 0) {
        table.erase(imm);
      } else {
        model[imm] = std::make_shared<ImmState>(imm, std::weak_ptr<EngineCore>());
        table.insert(model[imm]);
      }
      for (int look = 0; look < 4; ++look) {
        const uint32_t other = look == 0 ? imm : values[rng() % values.size()];
        const auto wanted = model.find(other);
        ASSERT_EQ(table.find(other), wanted == model.end() ? nullptr : wanted->second.get());
        ASSERT_EQ(table.shared(other), wanted == model.end() ? nullptr : wanted->second);
      }
    }
    table.erase(values[0]);
    table.erase(values[0]);
  }
}

// Values that are used once each, as a request's of a server, do not run out.
TEST(Immediates, ReleasedValuesMakeRoom) {
  constexpr uint32_t kValues = 70000, kAtOnce = 1000;
  TransferEngine a(local()), b(local());
  auto source = a.allocate(8), target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  for (uint32_t first = 0; first < kValues; first += kAtOnce) {
    for (uint32_t imm = first; imm < first + kAtOnce; ++imm) {
      a.write({source.get(), 0, remote.get(), 0, 8, imm});
    }
    for (uint32_t imm = first; imm < first + kAtOnce; ++imm) {
      ASSERT_EQ(wait_arrived(a, b, imm, 1), 1u) << imm;
      b.release_immediate(imm);
    }
  }
  EXPECT_EQ(b.stats().unknown_immediates, 0u);
}

TEST(Immediates, TooManyAtATimeAreRefused) {
  TransferEngine engine(local());
  for (uint32_t imm = 0; imm < 65536; ++imm) engine.imm_counter(imm);
  EXPECT_EQ(kind_of([&] { engine.imm_counter(65536); }), ErrorKind::kInvalidArgument);
  engine.release_immediate(65536);  // there is none: no place is won
  EXPECT_EQ(kind_of([&] { engine.imm_counter(65536); }), ErrorKind::kInvalidArgument);
  engine.release_immediate(7);
  engine.imm_counter(65536);
  EXPECT_EQ(kind_of([&] { engine.imm_counter(7); }), ErrorKind::kInvalidArgument);
}

TEST(Immediates, AReleasedValueEndsItsWaitsAndStartsAnew) {
  TransferEngine a(local()), b(local());
  auto source = a.allocate(8), target = b.allocate(8);
  auto remote = a.open(target->descriptor());
  const auto write = [&] { a.write_future({source.get(), 0, remote.get(), 0, 8, 5}).get(); };
  write();
  EXPECT_EQ(wait_arrived(a, b, 5, 1), 1u);
  const auto counter = b.imm_counter(5);
  auto& told = lasting_counter();
  b.when(counter, 2, &told);
  auto waiting = std::async(std::launch::async, [&] { return kind_of([&] { counter.wait(2, 60s); }); });
  std::this_thread::sleep_for(5ms);
  b.release_immediate(5);
  EXPECT_EQ(told.done(), 1u);
  EXPECT_EQ(told.error()->kind(), ErrorKind::kClosed);
  ASSERT_EQ(waiting.wait_for(scaled(20s)), std::future_status::ready);
  EXPECT_EQ(waiting.get(), ErrorKind::kClosed);
  EXPECT_EQ(kind_of([&] { b.when(counter, 2, &told); }), ErrorKind::kClosed);
  write();
  EXPECT_EQ(wait_arrived(a, b, 5, 1), 1u);
  EXPECT_EQ(b.imm_counter(5).value(), 1u) << "counted from 0";
  EXPECT_EQ(counter.value(), 1u) << "as it was";
  counter.wait(1);
  EXPECT_EQ(kind_of([&] { b.release_immediate(kReservedImmediate | 5); }), ErrorKind::kInvalidArgument);
}

}  // namespace
}  // namespace pplx::testing
