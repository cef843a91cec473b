// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// capnp-shm-bench: the driver, and by `--role` the processes that it starts.

#include "client.h"
#include "driver.h"
#include "processes.h"
#include "server.h"
#include <fcntl.h>
#include <kj/debug.h>
#include <kj/io.h>
#include <kj/main.h>
#include <stdlib.h>
#include <unistd.h>

namespace capnpshm {
namespace bench {
namespace {

class BenchMain {
public:
  explicit BenchMain(kj::ProcessContext& context): context(context) {}

  kj::MainFunc getMain() {
    return kj::MainBuilder(context, "capnp-shm-bench",
        "Compares SharedMemoryVatNetwork with TwoPartyVatNetwork, and both with the limits of the "
        "machine. bench/run builds it and runs it.")
        .addOption({"quick"}, KJ_BIND_METHOD(*this, setQuick), "Measure for at most a minute.")
        .addOption({"tiny"}, KJ_BIND_METHOD(*this, setTiny),
            "Measure next to nothing: only to see that everything works.")
        .addOption({"peers"}, KJ_BIND_METHOD(*this, setPeers),
            "Also measure the other libraries that were found when this was built.")
        .addOption({"strace"}, KJ_BIND_METHOD(*this, setStrace),
            "Count system calls by strace even where the kernel could do it.")
        .addOptionWithArg({"only"}, KJ_BIND_METHOD(*this, setOnly), "<case>", "Run only this case.")
        .addOptionWithArg({"json"}, KJ_BIND_METHOD(*this, setJson), "<file>",
            "Write the results here instead of to standard output.")
        .addOptionWithArg({"role"}, KJ_BIND_METHOD(*this, setRole), "<role>",
            "Be one of the driver's processes.")
        .addOptionWithArg({"transport"}, KJ_BIND_METHOD(*this, setTransport), "<name>",
            "For the driver's processes: the transport to use.")
        .addOptionWithArg({"core"}, KJ_BIND_METHOD(*this, setCore), "<number>",
            "For the driver's processes: the core to run on.")
        .addOptionWithArg({"address"}, KJ_BIND_METHOD(*this, setAddress), "<name>",
            "For the driver's processes: the server's abstract Unix socket.")
        .addOptionWithArg({"server-pid"}, KJ_BIND_METHOD(*this, setServerPid), "<pid>",
            "For the client: the server's process.")
        .addOptionWithArg({"peer-core"}, KJ_BIND_METHOD(*this, setPeerCore), "<number>",
            "For the client: the core that the server runs on.")
        .callAfterParsing(KJ_BIND_METHOD(*this, run))
        .build();
  }

private:
  kj::ProcessContext& context;
  DriverOptions options;
  kj::StringPtr jsonFile;
  kj::StringPtr role;
  kj::StringPtr transport;
  kj::StringPtr address;
  uint core = 0;
  uint peerCore = 0;
  pid_t serverPid = 0;

  typedef kj::MainBuilder::Validity Validity;

  Validity setQuick() { options.quick = true; return true; }
  Validity setTiny() { options.tiny = true; return true; }
  Validity setPeers() { options.withPeers = true; return true; }
  Validity setStrace() { options.useStrace = true; return true; }
  Validity setOnly(kj::StringPtr name) {
    auto names = caseNames();
    for (auto known: names) {
      if (known == name) {
        options.only = kj::str(name);
        return true;
      }
    }
    return kj::str("there is no such case; those there are: ", kj::strArray(names, " "));
  }
  Validity setJson(kj::StringPtr path) { jsonFile = path; return true; }
  Validity setRole(kj::StringPtr name) { role = name; return true; }
  Validity setTransport(kj::StringPtr name) { transport = name; return true; }
  Validity setAddress(kj::StringPtr name) { address = name; return true; }
  Validity setCore(kj::StringPtr text) { core = strtoul(text.cStr(), nullptr, 10); return true; }
  Validity setPeerCore(kj::StringPtr text) {
    peerCore = strtoul(text.cStr(), nullptr, 10);
    return true;
  }
  Validity setServerPid(kj::StringPtr text) {
    serverPid = strtol(text.cStr(), nullptr, 10);
    return true;
  }

  Validity run() {
    raiseFdLimit();
    if (role.size() == 0) return drive();

    dieWithParent();
    pinTo(0, core);
    if (role == "server") {
      auto& spec = findTransport(transport);
      if (spec.kind == TransportSpec::PEER) {
        servePeer(spec.name, address);
      } else {
        serve(spec, 3);
      }
    } else if (role == "client") {
      ClientOptions client;
      client.transport = transport;
      client.address = kj::str(address);
      client.serverPid = serverPid == 0 ? getpid() : serverPid;
      client.peerCore = peerCore;
      client.tasksFd = 3;
      client.outcomesFd = 4;
      runClient(client);
    } else if (role == "burner") {
      for (;;) asm volatile("" ::: "memory");
    } else {
      return kj::str("there is no such role");
    }
    return true;
  }

  Validity drive() {
    Results results;
    runAll(options, results);
    auto json = kj::str(results.toJson(options.quick || options.tiny), '\n');
    int fd = STDOUT_FILENO;
    kj::AutoCloseFd file;
    if (jsonFile.size() > 0) {
      KJ_SYSCALL(fd = open(jsonFile.cStr(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666),
          jsonFile);
      file = kj::AutoCloseFd(fd);
    }
    kj::FdOutputStream(fd).write(json.begin(), json.size());
    return true;
  }
};

}  // namespace
}  // namespace bench
}  // namespace capnpshm

KJ_MAIN(capnpshm::bench::BenchMain)
