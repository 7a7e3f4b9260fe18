"""Real federations: the same algorithms with every client on its own machine, over Flower.

| where | what |
|---|---|
| `provision/` | provisioning bundles: certificates, keys, settings, scripts |
| `client/` | a client's process, images, settings, rounds, certificates, state, privacy budget |
| `server/` | the server's process, connected clients, rounds, collected certificates |
| `transport/` | messages, their schemas, and Flower |
| `status.py` | the state of a server's or client's folder, or of a study |
| `client_app.py`, `server_app.py` | apps for a Flower deployment that is operated by others |

Only this package imports flwr, which the extra `certifl[flower]` installs.
"""
