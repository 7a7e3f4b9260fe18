"""Real federations: the same algorithms with every client on a machine of its own, over Flower.

| where | what |
|---|---|
| `provision/` | what each client gets: certificates, keys, settings, scripts |
| `client/` | a client's images, settings, rounds, certificates, state and privacy ledger |
| `server/` | connected clients, rounds, certificates that come back |
| `transport/` | messages, their schemas, and Flower |
| `processes.py` | the processes of server and clients, from start to stop |
| `client_app.py`, `server_app.py` | apps for a Flower deployment that is operated by others |

Only this package imports flwr, which the extra `certifl[flower]` installs.
"""
