"""The client's app for Flower: gives each message to the party's own half."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from certifl.deploy.client.client import Client
from certifl.deploy.client.rejected import plain
from certifl.deploy.client.settings import load_settings
from certifl.deploy.transport.messages import Content, MalformedMessage, from_records, to_records
from certifl.errors import StoreError

_log = logging.getLogger(__name__)
_RAISED = 2  # Flower's CLIENT_APP_RAISED_EXCEPTION


def respond(message: Message, party: Client) -> Message:
    """The reply to a message; an error of Flower's where it is none of ours.

    What is sent stands in the client's own log before it leaves.
    """
    try:
        order = from_records(message.content)
    except MalformedMessage as error:
        _log.error("A message of the server is garbled: %s", plain(str(error)))
        return _error(message, party, f"the order is garbled: {plain(str(error))}")
    try:
        return _answer(message, party, order)
    except StoreError as error:
        _log.error("%s", error)
        return _error(message, party, "its disk failed it")
    except Exception:
        _log.exception("An order of the server failed.")
        return _error(message, party, "it failed; its own log says more")


def _answer(message: Message, party: Client, order: Content) -> Message:
    answer = party.answer(order)
    records = to_records(answer)
    size = sum(len(str(record["json"]).encode()) for record in records.config_records.values())
    for record in records.array_records.values():
        size += sum(len(array.data) for array in record.values())
    party.sent.note(order.facts, answer, size)
    return Message(records, reply_to=message)


def _error(message: Message, party: Client, reason: str) -> Message:
    """A reply that holds a reason alone, also where the log of what is sent cannot be written."""
    try:
        party.sent.note_error(reason)
    except StoreError as error:
        _log.error("%s", error)
    return Message(Error(_RAISED, reason), reply_to=message)


_parties: dict[Path, Client] = {}


def party_of(context: Context) -> Client:
    """The party that a node's configuration names: `party` = the folder with client.toml."""
    folder = Path(str(context.node_config.get("party", "."))).expanduser().resolve()
    if folder not in _parties:
        _parties[folder] = Client(load_settings(folder / "client.toml"), folder)
    return _parties[folder]


def _answered(message: Message, context: Context) -> Message:
    return respond(message, party_of(context))


app = ClientApp()
app.train()(_answered)
app.query("join")(_answered)
app.query("certify")(_answered)
