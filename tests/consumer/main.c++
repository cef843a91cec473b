// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.
#include <capnp-shm/rpc-shm.h>

int main() {
  auto io = kj::setupAsyncIo();
  auto pipe = io.provider->newCapabilityPipe();
  capnpshm::SharedMemoryServer server(kj::Exception(kj::Exception::Type::FAILED, "", 0));
  server.accept(kj::mv(pipe.ends[0]), 0);
  capnpshm::SharedMemoryClient client(*pipe.ends[1]);
  // The server refuses every call; that it answers through shared memory is what counts here.
  for (int i = 0; i < 2; i++) {
    client.bootstrap().whenResolved().catch_([](kj::Exception&&) {}).wait(io.waitScope);
  }
  return client.getStats().incoming.transport == capnpshm::Transport::SHARED_MEMORY ? 0 : 1;
}
