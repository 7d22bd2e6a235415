"""ZDS: how the node agent hands pods to the node proxy. Codec and both ends.

One protobuf message per SOCK_SEQPACKET packet of at most 1024 bytes on a unix socket; an empty
packet is the end. The proxy dials and says hello, which nobody answers; from then on the agent
asks and the proxy acknowledges, one message in flight. A snapshot (Add or Keep for every pod,
then SnapshotSent) opens each connection. Add carries exactly one descriptor, the pod's network
namespace, by SCM_RIGHTS; between ends that both know our addition (see `codec`) also the pod's
listening sockets, and the answer carries them back.

Who owns a descriptor, at each moment:
- the agent's copy stays the agent's: `Session.add` borrows it until it returns;
- in flight the kernel holds a reference, so the agent may close its copy meanwhile;
- what arrives belongs to `ZdsConnection.receive`, which closes it if the message is refused
  (not one, not a network namespace, cut short, unreadable);
- once `receive` has returned an `Add`, `Add.fds` belong to the caller, who closes them;
- listeners that `ZdsConnection.ack` sends stay the proxy's: the agent gets duplicates, which
  belong to the `take` that was given to `Session.add`.
"""

from __future__ import annotations

from mesh.zds.agent import Session, ZdsServer
from mesh.zds.codec import Add, Answer, Del, Keep, Listener, Message, SnapshotSent
from mesh.zds.proxy import ZdsConnection, connect

__all__ = [
    "Add",
    "Answer",
    "Del",
    "Keep",
    "Listener",
    "Message",
    "Session",
    "SnapshotSent",
    "ZdsConnection",
    "ZdsServer",
    "connect",
]
