// Copyright (c) 2026 The capnp-shm authors. Licensed under the MIT License; see LICENSE.

// Small calls: one after the other.

#include "client.h"

namespace capnpshm {
namespace bench {

void smallCall(Session& session, Task::Reader task, Figures& figures) {
  auto& target = session.target();
  Slice slice(session, task);
  slice.run([&]() { session.echo(target).wait(session.waitScope()); });
  slice.report(figures);
}

}  // namespace bench
}  // namespace capnpshm
