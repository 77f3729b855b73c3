// Names of calls, read by other processes of the host.
#include "xla_ffi/cuda/site_book.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "proxy/error.h"
#include "xla_ffi/cuda/control_block.h"

namespace pplx::moe::cuda {
namespace {

std::string name_in(const SiteBookView& book, Kind kind, uint64_t tag) {
  const auto site = book.find(kind, tag);
  return site ? site->name : "nothing";
}

TEST(SiteBook, TellsWhatWasThereAndWhatComes) {
  Sites sites;
  sites.index(Kind::kDispatch, 1, "before");
  const SiteBookView book(sites.share());
  EXPECT_EQ(name_in(book, Kind::kDispatch, 1), "before");
  EXPECT_EQ(name_in(book, Kind::kCombine, 1), "nothing");
  sites.index(Kind::kCombine, 1, "after");
  sites.index(Kind::kCombine, 1, "after");
  EXPECT_EQ(name_in(book, Kind::kCombine, 1), "after");
  const SiteBookView again(sites.share());
  EXPECT_EQ(name_in(again, Kind::kCombine, 1), "after");
}

TEST(SiteBook, OutlivesItsWriter) {
  auto sites = std::make_unique<Sites>();
  const SiteBookView book(sites->share());
  sites->index(Kind::kDispatch, 4, "layer");
  sites.reset();
  EXPECT_EQ(name_in(book, Kind::kDispatch, 4), "layer");
}

TEST(SiteBook, CutsLongNamesAndLeavesOutWhatDoesNotFit) {
  SiteBook book(2);
  const SiteBookView view(book.share());
  book.add({.kind = Kind::kDispatch, .tag = 1, .name = std::string(500, 'x')});
  book.add({.kind = Kind::kDispatch, .tag = 2, .name = ""});
  book.add({.kind = Kind::kDispatch, .tag = 3, .name = "one too many"});
  EXPECT_EQ(name_in(view, Kind::kDispatch, 1), std::string(83, 'x'));
  EXPECT_EQ(name_in(view, Kind::kDispatch, 2), "");
  EXPECT_EQ(name_in(view, Kind::kDispatch, 3), "nothing");
}

TEST(SiteBook, AnythingElseIsRefused) {
  const auto refused = [](const OwnedFd& file) {
    try {
      const SiteBookView view(file);
      return std::string("taken");
    } catch (const Error& error) {
      return std::string(error.what());
    }
  };
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const OwnedFd out(ends[0]), in(ends[1]);
  EXPECT_NE(refused(out).find("may shrink"), std::string::npos);
  const OwnedFd loose(memfd_create("loose", MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(loose.get(), 4096), 0);
  EXPECT_NE(refused(loose).find("may shrink"), std::string::npos);
  const OwnedFd small(memfd_create("small", MFD_ALLOW_SEALING));
  ASSERT_EQ(fcntl(small.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_NE(refused(small).find("0 bytes"), std::string::npos);
  ASSERT_EQ(fcntl(loose.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_NE(refused(loose).find("magic number"), std::string::npos);
  EXPECT_EQ(refused(SiteBook(8).share()), "taken");
}

// A count beyond the file's end is one that somebody made up.
TEST(SiteBook, ACountIsNotBelieved) {
  SiteBook book(1);
  book.add({.kind = Kind::kDispatch, .tag = 1, .name = "real"});
  const OwnedFd file = book.share();
  const uint32_t absurd = ~0U;
  ASSERT_EQ(pwrite(file.get(), &absurd, sizeof(absurd), 4), static_cast<ssize_t>(sizeof(absurd)));
  const SiteBookView view(file);
  EXPECT_EQ(name_in(view, Kind::kDispatch, 1), "real");
  EXPECT_EQ(name_in(view, Kind::kDispatch, 2), "nothing");
}

}  // namespace
}  // namespace pplx::moe::cuda
