// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

#include "conformance-raw.h"
#include "emulator.h"

#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

// File descriptors: capabilities with getFd(), and messages that carry descriptors themselves. In
// modes whose stream does not pass them everything else must arrive, without them. No test may
// leave a descriptor open.

namespace capnpshm {
namespace conformance {
namespace {

uint openFds() {
  auto dir = opendir("/proc/self/fd");
  KJ_REQUIRE(dir != nullptr);
  KJ_DEFER(closedir(dir));
  uint result = 0;
  while (readdir(dir) != nullptr) ++result;
  return result;
}

template <typename Base>
class CountingFds: public Base {
  // Checks that each descriptor which a test opens, sends or receives is closed again.

protected:
  CountingFds(): before(openFds()) {}

  void TearDown() override {
    this->turn();
    EXPECT_EQ(before, openFds());
  }

  LinkOptions fdLimit(uint maxFds) {
    LinkOptions options;
    options.maxFds = maxFds;
    return options;
  }

  std::string passed(std::string text) { return this->mode().passesFds() ? text : "none"; }

private:
  uint before;
};

constexpr const char* NO_FD = nullptr;

template <typename Base>
class FdCalls: public CountingFds<Base> {
protected:
  struct Result {
    std::vector<std::string> contents;
    Item::Client item = nullptr;
  };

  kj::Promise<Result> files(Root::Client root, std::vector<const char*> texts, size_t bytes = 0) {
    // Sends an item for each text, with a descriptor to read the text from if there is one.
    std::vector<std::string> copies;
    auto request = root.filesRequest();
    auto items = request.initItems(texts.size());
    for (uint i = 0; i < texts.size(); i++) {
      if (texts[i] == NO_FD) items.set(i, kj::heap<ItemImpl>(this->mine, "no file"));
      else items.set(i, kj::heap<FileItem>(this->mine, pipeWith(texts[i])));
    }
    fillPattern(request.initFill(bytes), 1);
    return request.send().then([](capnp::Response<Root::FilesResults>&& response) {
      Result result;
      for (auto text: response.getContents()) result.contents.push_back(text.cStr());
      result.item = response.getItem();
      return result;
    });
  }

  std::string readReply(Item::Client item) {
    auto fd = this->await(item.getFd());
    KJ_IF_MAYBE(f, fd) {
      char buffer[64];
      ssize_t n;
      KJ_SYSCALL(n = read(*f, buffer, sizeof(buffer)));
      return std::string(buffer, n);
    }
    return "none";
  }
};

using Strings = std::vector<std::string>;

class Fds: public FdCalls<Conformance> {};
class FdsThreaded: public FdCalls<ThreadedConformance> {};
class RawFds: public CountingFds<RawConformance> {};

std::vector<Mode> fdModes() {
  // All but those over KJ's own pipes, which confuse the descriptors that came with the room there
  // is for them (kj::max() for kj::min() in async-io.c++, up to 1.4.0), whoever uses them.
  std::vector<Mode> result;
  for (auto& mode: allModes()) {
    if (mode.stream != StreamKind::IN_PROCESS) result.push_back(mode);
  }
  return result;
}

INSTANTIATE_TEST_SUITE_P(Modes, Fds, testing::ValuesIn(fdModes()), modeName);
INSTANTIATE_TEST_SUITE_P(Modes, FdsThreaded, testing::ValuesIn(socketModes()), modeName);
INSTANTIATE_TEST_SUITE_P(Modes, RawFds, testing::ValuesIn(fdModes()), modeName);

TEST_P(Fds, BothWays) {
  auto link = connect(state, fdLimit(2));
  auto root = link->client->root();
  for (uint i = 0; i < 5; i++) {
    // The first while the upgrade is under way.
    auto result = await(files(root, { "foo", "bar" }));
    EXPECT_EQ(Strings({ passed("foo"), passed("bar") }), result.contents);
    EXPECT_EQ(passed("reply"), readReply(result.item));
  }
}

TEST_P(Fds, AsManyAsAllowedInOneMessage) {
  auto link = connect(state, fdLimit(16));
  std::vector<std::string> texts;
  std::vector<const char*> pointers;
  Strings expected;
  for (uint i = 0; i < 16; i++) texts.push_back("text " + std::to_string(i));
  for (auto& text: texts) {
    pointers.push_back(text.c_str());
    expected.push_back(passed(text));
  }
  auto root = link->client->root();
  for (uint i = 0; i < 3; i++) EXPECT_EQ(expected, await(files(root, pointers)).contents);
}

TEST_P(Fds, OnlySomeCapabilitiesHaveOne) {
  auto link = connect(state, fdLimit(3));
  auto root = link->client->root();
  for (uint i = 0; i < 3; i++) {
    EXPECT_EQ(Strings({ "none", passed("second"), "none", passed("fourth") }),
              await(files(root, { NO_FD, "second", NO_FD, "fourth" })).contents);
    EXPECT_EQ(Strings({ "none" }), await(files(root, { NO_FD })).contents);
  }
}

TEST_P(Fds, ExcessIsDroppedAndAttachedToNoOtherMessage) {
  CAPNP_SHM_NEEDS_EXCESS_FDS_CLOSED;
  auto link = connect(state, fdLimit(2));
  auto root = link->client->root();
  await(root.sequenceRequest().send());
  for (uint i = 0; i < 4; i++) {
    auto first = files(root, { "1", "2", "3", "4", "5" });
    auto second = files(root, { "6" });
    auto third = files(root, { NO_FD, NO_FD });
    auto fourth = files(root, { "7", "8", "9" });
    EXPECT_EQ(Strings({ passed("1"), passed("2"), "none", "none", "none" }),
              await(kj::mv(first)).contents);
    EXPECT_EQ(Strings({ passed("6") }), await(kj::mv(second)).contents);
    EXPECT_EQ(Strings({ "none", "none" }), await(kj::mv(third)).contents);
    EXPECT_EQ(Strings({ passed("7"), passed("8"), "none" }), await(kj::mv(fourth)).contents);
  }
}

TEST_P(Fds, NoneAreAllowed) {
  auto link = connect(state);
  auto root = link->client->root();
  for (uint i = 0; i < 3; i++) {
    auto result = await(files(root, { "1", "2" }));
    EXPECT_EQ(Strings({ "none", "none" }), result.contents);
    EXPECT_EQ("none", readReply(result.item));
  }
}

TEST_P(Fds, BehindLargeMessages) {
  // Which wait for room in shared memory, where there is little of it.
  auto link = connect(state, fdLimit(2));
  auto root = link->client->root();
  kj::Vector<kj::Promise<Result>> results;
  kj::Vector<kj::Promise<void>> echoes;
  for (uint i = 0; i < 6; i++) {
    auto request = root.echoRequest();
    request.setData(pattern(200000, i));
    echoes.add(request.send().then([i](capnp::Response<Root::EchoResults>&& response) {
      EXPECT_TRUE(isPattern(response.getData(), i));
    }));
    results.add(files(root, { "small" }));
    results.add(files(root, { "large", "large too" }, 100000));
  }
  for (uint i = 0; i < results.size(); i += 2) {
    EXPECT_EQ(Strings({ passed("small") }), await(kj::mv(results[i])).contents);
    EXPECT_EQ(Strings({ passed("large"), passed("large too") }),
              await(kj::mv(results[i + 1])).contents);
  }
  await(kj::joinPromises(echoes.releaseAsArray()));
}

TEST_P(Fds, ManyCallsAtOnce) {
  auto link = connect(state, fdLimit(1));
  auto root = link->client->root();
  await(root.sequenceRequest().send());
  std::vector<std::string> texts;
  kj::Vector<kj::Promise<Result>> results;
  for (uint i = 0; i < 100; i++) texts.push_back(std::to_string(i));
  for (auto& text: texts) results.add(files(root, { text.c_str() }));
  for (uint i = 0; i < texts.size(); i++) {
    auto result = await(kj::mv(results[i]));
    ASSERT_EQ(Strings({ passed(texts[i]) }), result.contents);
    ASSERT_EQ(passed("reply"), readReply(result.item));
  }
}

TEST_P(FdsThreaded, ManyCallsAtOnce) {
  auto server = connectThread(state, fdLimit(1));
  auto root = server->client->root();
  for (uint round = 0; round < 5; round++) {
    std::vector<std::string> texts;
    kj::Vector<kj::Promise<Result>> results;
    for (uint i = 0; i < 80; i++) texts.push_back(std::to_string(i));
    for (auto& text: texts) results.add(files(root, { text.c_str() }, round * 1000));
    for (uint i = 0; i < texts.size(); i++) {
      auto result = await(kj::mv(results[i]));
      ASSERT_EQ(Strings({ passed(texts[i]) }), result.contents);
      ASSERT_EQ(passed("reply"), readReply(result.item));
    }
  }
}

TEST_P(Fds, OfACanceledCallAreClosed) {
  auto link = connect(state, fdLimit(1));
  auto root = link->client->root();
  LoopFixture::settle(
      [&]() { await(root.sequenceRequest().send()); }, link->client->network);
  turn();
  uint before = openFds();
  auto request = root.neverRequest();
  request.setItem(kj::heap<FileItem>(mine, pipeWith("unread")));
  auto promise = request.send();
  until([&]() { return state.running == 1; });
  EXPECT_EQ(before + (mode().passesFds() ? 2 : 1), openFds());
  { auto drop = kj::mv(promise); }
  until([&]() { return state.running == 0 && mine.items == 0; });
  turn();
  EXPECT_EQ(before, openFds());
}

TEST_P(Fds, OfACallCanceledBeforeItLeavesAreClosed) {
  auto link = connect(state, fdLimit(1));
  auto root = link->client->root();
  LoopFixture::settle(
      [&]() { await(root.sequenceRequest().send()); }, link->client->network);
  turn();
  uint before = openFds();
  {
    auto request = root.keepRequest();
    request.setItem(kj::heap<FileItem>(mine, pipeWith("unread")));
    auto promise = request.send();
  }
  // The call itself cannot be canceled.
  await(root.sequenceRequest().send());
  await(root.keepRequest().send().ignoreResult());
  until([&]() { return mine.items == 0; });
  turn();
  EXPECT_EQ(before, openFds());
}

TEST_P(Fds, OfAnUnusedCapabilityAreClosedWithIt) {
  auto link = connect(state, fdLimit(1));
  auto root = link->client->root();
  LoopFixture::settle(
      [&]() { await(root.sequenceRequest().send()); }, link->client->network);
  turn();
  uint before = openFds();
  for (uint i = 0; i < 10; i++) {
    auto request = root.keepRequest();
    request.setItem(kj::heap<FileItem>(mine, pipeWith("unread")));
    await(request.send().ignoreResult());
  }
  turn();
  EXPECT_EQ(before + (mode().passesFds() ? 2 : 1), openFds());
  await(root.keepRequest().send().ignoreResult());
  until([&]() { return mine.items == 0; });
  turn();
  EXPECT_EQ(before, openFds());
}

TEST_P(Fds, AreClosedWithTheConnection) {
  auto link = connect(state, fdLimit(2));
  auto root = link->client->root();
  auto keep = root.keepRequest();
  keep.setItem(kj::heap<FileItem>(mine, pipeWith("kept")));
  await(keep.send().ignoreResult());
  auto result = await(files(root, { "1", "2" }));
  // And some that the server does not take any more.
  kj::Vector<kj::Promise<Result>> lost;
  for (uint i = 0; i < 100; i++) lost.add(files(root, { "lost", "lost too" }, 2000));
  link->destroyServer();
  for (auto& promise: lost) {
    // What was answered in time is as good.
    kj::runCatchingExceptions([&]() { await(kj::mv(promise)); });
  }
  link->destroyClient();
}

// =======================================================================================
// Messages with descriptors

class Payload {
  // Descriptors to send: pipes from which a text can be read.

public:
  Payload(std::initializer_list<std::string> texts) {
    for (auto& text: texts) fds.push_back(pipeWith(text.c_str()));
  }

  void send(Connection& connection, uint n, size_t bytes) {
    auto numbers = kj::heapArray<int>(fds.size());
    for (uint i = 0; i < fds.size(); i++) numbers[i] = fds[i].get();
    auto message = newMessage(connection, n, bytes);
    message->setFds(kj::mv(numbers));
    message->send();
  }

private:
  std::vector<kj::AutoCloseFd> fds;
};

Strings readAll(kj::ArrayPtr<kj::AutoCloseFd> fds) {
  Strings result;
  for (auto& fd: fds) {
    char buffer[64];
    ssize_t n;
    KJ_SYSCALL(n = read(fd, buffer, sizeof(buffer)));
    result.push_back(std::string(buffer, n));
    int flags;
    KJ_SYSCALL(flags = fcntl(fd, F_GETFD));
    EXPECT_TRUE(flags & FD_CLOEXEC);
  }
  return result;
}

TEST_P(RawFds, StayWithTheirMessageWhateverItsSize) {
  auto raw = connectRaw(fdLimit(2));
  for (uint round = 0; round < 2; round++) {
    size_t sizes[] = { 0, 8, 100, 1000, 10000, 40000, 300000 };
    kj::Vector<kj::Own<Payload>> sent;  // Till they have left: TwoParty sends the numbers later.
    uint n = 0;
    for (auto bytes: sizes) {
      auto name = std::to_string(n);
      sent.add(kj::heap<Payload>(Payload { name + "a", name + "b" }))->send(*raw->client, n, bytes);
      sendMessage(*raw->client, n + 1, bytes);
      sent.add(kj::heap<Payload>(Payload { name + "c" }))->send(*raw->client, n + 2, bytes);
      n += 3;
    }
    n = 0;
    bool passes = mode().passesFds();
    for (auto bytes: sizes) {
      auto name = std::to_string(n);
      auto message = next(*raw->server);
      EXPECT_TRUE(isMessage(*message, n, bytes));
      EXPECT_EQ(passes ? Strings({ name + "a", name + "b" }) : Strings(),
                readAll(message->getAttachedFds()));
      message = nullptr;
      message = next(*raw->server);
      EXPECT_TRUE(isMessage(*message, n + 1, bytes));
      EXPECT_EQ(0, message->getAttachedFds().size());
      message = nullptr;
      message = next(*raw->server);
      EXPECT_TRUE(isMessage(*message, n + 2, bytes));
      EXPECT_EQ(passes ? Strings({ name + "c" }) : Strings(), readAll(message->getAttachedFds()));
      n += 3;
    }
    settle(*raw);
  }
}

TEST_P(RawFds, ManyWaitForAReaderThatIsSlow) {
  // More than the sender may have on their way.
  auto raw = connectRaw(fdLimit(1));
  settle(*raw);
  // Until the descriptor ring has grown so far that it is not what holds them back.
  for (uint round = 0; round < 12; round++) {
    for (uint i = 0; i < 300; i++) sendMessage(*raw->client, i, 8);
    for (uint i = 0; i < 300; i++) ASSERT_TRUE(isMessage(*next(*raw->server), i, 8));
  }
  constexpr uint COUNT = 4 * 50;
  bool passes = mode().passesFds();
  for (auto bytes: { 8, 3000 }) {
    kj::Vector<kj::Own<Payload>> sent;
    for (uint i = 0; i < COUNT; i++) {
      if (i % 4 == 3) {
        sendMessage(*raw->client, i, bytes);
      } else {
        sent.add(kj::heap<Payload>(Payload { std::to_string(i) }))->send(*raw->client, i, bytes);
      }
    }
    for (uint i = 0; i < 2 * COUNT; i++) turn();  // As far as it goes without a reader.
    for (uint i = 0; i < COUNT; i++) {
      auto message = next(*raw->server);
      ASSERT_TRUE(isMessage(*message, i, bytes));
      ASSERT_EQ(passes && i % 4 != 3 ? Strings({ std::to_string(i) }) : Strings(),
                readAll(message->getAttachedFds()));
    }
  }
}

TEST_P(RawFds, UnreadOnesAreClosedWithTheirMessage) {
  CAPNP_SHM_NEEDS_EXCESS_FDS_CLOSED;
  auto raw = connectRaw(fdLimit(2));
  settle(*raw);
  uint before = openFds();
  for (uint i = 0; i < 20; i++) {
    Payload payload { "a", "b", "c" };
    payload.send(*raw->client, i, 8);
    auto message = next(*raw->server);
    EXPECT_EQ(mode().passesFds() ? 2 : 0, message->getAttachedFds().size());
  }
  turn();
  EXPECT_EQ(before, openFds());
}

TEST_P(RawFds, UndeliveredOnesAreClosedWithTheConnection) {
  auto raw = connectRaw(fdLimit(2));
  settle(*raw);
  Payload payload { "a", "b" };
  for (uint i = 0; i < 100; i++) payload.send(*raw->client, i, 100);
  turn();
  auto message = next(*raw->server);
  EXPECT_EQ(mode().passesFds() ? 2 : 0, message->getAttachedFds().size());
}

TEST_P(RawFds, OutliveTheConnection) {
  kj::AutoCloseFd kept;
  Incoming message;
  {
    auto raw = connectRaw(fdLimit(1));
    settle(*raw);
    Payload payload { "kept" };
    payload.send(*raw->client, 1, 100);
    message = next(*raw->server);
  }
  auto fds = message->getAttachedFds();
  EXPECT_EQ(mode().passesFds() ? Strings({ "kept" }) : Strings(), readAll(fds));
}

}  // namespace
}  // namespace conformance
}  // namespace capnpshm
