"""The client's app for Flower: passes each message to the client."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from certifl.deploy.client.client import Client
from certifl.deploy.client.settings import load_settings
from certifl.deploy.messages import Content, MalformedMessage, from_records, to_records
from certifl.errors import StoreError, one_line

_log = logging.getLogger(__name__)
_RAISED = 2  # Flower's CLIENT_APP_RAISED_EXCEPTION


def respond(message: Message, client: Client) -> Message:
    """The reply to a message; one of Flower's errors where it is not certifl's.

    What is sent is in the client's own log before it leaves.
    """
    try:
        request = from_records(message.content)
    except MalformedMessage as error:
        _log.error("A message of the server is malformed: %s", one_line(error, 500))
        return _error(message, client, f"the request is malformed: {one_line(error, 500)}")
    try:
        return _answer(message, client, request)
    except StoreError as error:
        _log.error("%s", error)
        return _error(message, client, "its disk failed")
    except Exception:
        _log.exception("A request of the server failed.")
        return _error(message, client, "it failed; see its own log")


def _answer(message: Message, client: Client, request: Content) -> Message:
    answer = client.answer(request)
    records = to_records(answer)
    size = sum(len(str(record["json"]).encode()) for record in records.config_records.values())
    for record in records.array_records.values():
        size += sum(len(array.data) for array in record.values())
    client.sent.note(request.fields, answer, size)
    return Message(records, reply_to=message)


def _error(message: Message, client: Client, reason: str) -> Message:
    """A reply with a reason only, also where the log of sent messages cannot be written."""
    try:
        client.sent.note_error(reason)
    except StoreError as error:
        _log.error("%s", error)
    return Message(Error(_RAISED, reason), reply_to=message)


_clients_by_folder: dict[Path, Client] = {}


def client_for(context: Context) -> Client:
    """The client that a node's configuration names: `party` = the folder with client.toml."""
    folder = Path(str(context.node_config.get("party", "."))).expanduser().resolve()
    if folder not in _clients_by_folder:
        _clients_by_folder[folder] = Client(load_settings(folder / "client.toml"), folder)
    return _clients_by_folder[folder]


def _answered(message: Message, context: Context) -> Message:
    return respond(message, client_for(context))


app = ClientApp()
app.train()(_answered)
app.query("join")(_answered)
app.query("certify")(_answered)
