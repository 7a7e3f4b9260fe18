"""The rounds of a training whose clients are elsewhere: a runner of `federated.rounds`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord

from certifl.deploy.client.state import NEVER
from certifl.deploy.server.clients import POLL, ClientRegistry
from certifl.deploy.transport.messages import Content, encode, fingerprint_of, update_from
from certifl.deploy.transport.schemas import MalformedMessage, Reply, checked
from certifl.deploy.transport.transport import Node, NoReply
from certifl.errors import InputError
from certifl.federated.faults import ClientResult, Fault, mismatch
from certifl.federated.states import ClientData, ModelState, Parts, Update
from certifl.runs.checkpoints import StoredRound

_BETWEEN_LOOKS = 5.0
_KINDS = ("diverged", "raised", "wrong", "late", "ended")


class Away:
    """Clients that are counted here and have their data elsewhere."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> ClientData:
        raise InputError(f"The data of client {index} is on its own machine.")


@dataclass(frozen=True)
class Timeouts:
    """How long the server waits, in seconds.

    Attributes:
        answer: for an answer to an order. start: for clients to join at the beginning.
        absent: for a participant that is not there when a round begins, or goes in it.
    """

    answer: float = 3600.0
    start: float = 300.0
    absent: float = 60.0


@dataclass
class _Asked:
    """An order under way; `images` is how many the client trains on, as it joined."""

    node: Node
    images: int
    name: str
    until: float
    looked: float


@dataclass
class Remote:
    """Asks the clients of a round over a line; answers come in the order of participants.

    An order waits for its client: where a node was started again meanwhile, it is sent again, and
    a client answers the same to the same order.

    Attributes:
        crowd: who is there. patience: how long to wait.
        needed: of the server's parts those that clients need.
        begins: called before each round.
        sends: names of the parts that clients send in a round.
        steps: the most private steps that a client can take in a round.
        extra: what every part beside the model is like (it has an entry per trained weight).
    """

    crowd: ClientRegistry
    patience: Timeouts
    needed: Callable[[Parts], Parts]
    begins: Callable[[], None]
    sends: Callable[[int], tuple[str, ...]]
    steps: Callable[[int, int], int]
    extra: ModelState
    _absent: set[int] = field(default_factory=set)

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """An answer from every participant, in the order given, one at a time."""
        self.begins()
        wanted = set(participants)
        missing = self.crowd.wait_for(wanted - self._absent, self.patience.absent)
        self._absent = (missing | (self._absent & wanted)) - self.crowd.members.keys()
        round = _Round(self, current)
        for client in participants:
            round.ask(client)
        round.release()
        for client in participants:
            yield round.answer(client)


class _Round:
    """The orders and answers of one round."""

    def __init__(self, remote: Remote, current: StoredRound) -> None:
        self._crowd, self._patience = remote.crowd, remote.patience
        self._needed, self._extra = remote.needed, remote.extra
        self._steps = remote.steps
        self._sends = set(remote.sends(current.number))
        self._current = current
        self._encoded: Mapping[str, ArrayRecord] | None = None
        self._named = ""
        self._asked: dict[int, _Asked] = {}
        self._began = time.perf_counter()

    def ask(self, client: int) -> None:
        """Send the round's order to a client that is there."""
        member = self._crowd.members.get(client)
        if member is None:
            return
        facts = {
            "order": "round",
            "study": dict(self._crowd.study),
            "client": client,
            "round": self._current.number,
            "counted": last_counted(self._current, client),
        }
        encoded = self._broadcast()
        order = Content({**facts, "broadcast": self._named}, encoded=encoded)
        name = self._crowd.line.send(member.node.id, order, self._patience.answer)
        now, images = time.monotonic(), member.joined.train_images
        until = now + self._patience.answer
        self._asked[client] = _Asked(member.node, images, name, until, now)

    def release(self) -> None:
        """Let go of the broadcast: it is read again should it be needed."""
        self._encoded = None

    def _broadcast(self) -> Mapping[str, ArrayRecord]:
        if self._encoded is None:
            parts = self._needed(self._current.server())
            self._named = self._named or fingerprint_of(parts)
            self._encoded = encode(parts)
        return self._encoded

    def answer(self, client: int) -> ClientResult:
        """Wait for a client's answer."""
        asked = self._asked.pop(client, None)
        if asked is None:
            why = self._crowd.refused.get(client)
            reason = "it is not there" if why is None else f"it was not taken, {why}"
            return ClientResult(client, 0.0, None, Fault("late", reason))
        while True:
            content = self._crowd.line.take(asked.name)
            if isinstance(content, NoReply) and content.gone:
                again = self._back(client)
                if again is not None:
                    asked = again
                    continue
            if content is not None:
                return self._read(client, asked.images, content)
            now = time.monotonic()
            if now > asked.until:
                return self._fault(client, "late", "no answer came in time")
            if now - asked.looked > _BETWEEN_LOOKS:
                asked = self._looked(client, asked)
            time.sleep(POLL)

    def _back(self, client: int) -> _Asked | None:
        """A client whose machine went, asked again if it comes back; None if it does not."""
        if self._crowd.wait_for({client}, self._patience.absent):
            return None
        self.ask(client)
        self.release()
        return self._asked.pop(client)

    def _looked(self, client: int, asked: _Asked) -> _Asked:
        """See whether the client's node was started again; then ask again."""
        self._crowd.look()
        member = self._crowd.members.get(client)
        if member is not None and member.node != asked.node:
            self.ask(client)
            self.release()
            again = self._asked.pop(client)
            return replace(again, until=asked.until)
        return replace(asked, looked=time.monotonic())

    def _read(self, client: int, images: int, content: Content | NoReply) -> ClientResult:
        if isinstance(content, NoReply):
            return self._fault(client, "ended" if content.gone else "wrong", content.reason)
        try:
            reply = checked(Reply, content.facts, "no answer to a round")
            # No longer than it was waited for, whatever the client's clock says.
            seconds = min(reply.seconds, time.perf_counter() - self._began)
            fault = fault_of(reply) or self._problem(client, reply)
            if fault is not None:
                return ClientResult(client, seconds, None, fault)
            update, state = update_from(content)
        except MalformedMessage as error:
            return self._fault(client, "wrong", f"its answer is garbled, {error}")
        fault = self._unlike(client, images, update)
        return ClientResult(client, seconds, None if fault is not None else (update, state), fault)

    def _problem(self, client: int, reply: Reply) -> Fault | None:
        if reply.client != client:
            return Fault("wrong", f"it answered as client {reply.client}")
        if reply.round != self._current.number:
            return Fault("wrong", f"it answered round {reply.round}")
        if reply.started_from != self._named:
            return Fault("wrong", "it trained from another model than it was sent (fingerprint)")
        return None

    def _unlike(self, client: int, images: int, update: Update) -> Fault | None:
        """What an update says that this client, in this round, cannot say."""
        if update.weight != images:
            said = f"its weight is {update.weight:g}"
            return Fault("wrong", f"{said}, and it has {images} training images as it joined")
        most, steps = (
            self._steps(client, self._current.number),
            update.metrics.get("private_steps"),
        )
        if steps is not None and steps > most:
            return Fault(
                "wrong", f"it counts {steps} private steps, and at most {most} were asked"
            )
        sent = set(update.extra) | ({"model"} if update.model is not None else set())
        if sent != self._sends:
            listed = [", ".join(sorted(names)) or "no parts" for names in (sent, self._sends)]
            return Fault("wrong", f"it sent {listed[0]}, and this round asks for {listed[1]}")
        for part, held in update.extra.items():
            differs = mismatch(self._extra, held)
            if differs is not None:
                return Fault("wrong", f"its {part} does not fit, {differs}")
        return None

    def _fault(self, client: int, kind: str, reason: str) -> ClientResult:
        return ClientResult(client, time.perf_counter() - self._began, None, Fault(kind, reason))


def fault_of(reply: Reply) -> Fault | None:
    """What a client says has failed."""
    told = reply.fault
    if told is None:
        return None
    return Fault(told.kind if told.kind in _KINDS else "raised", told.reason)


def last_counted(current: StoredRound, client: int) -> int:
    """The last round that a client was counted in, or `NEVER`."""
    for entry in reversed(current.history):
        if any(row["client"] == client for row in entry["clients"]):
            return int(entry["round"])
    return NEVER
