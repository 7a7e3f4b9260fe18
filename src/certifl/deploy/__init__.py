"""Real federations: the same algorithms with every client on its own machine, over Flower.

| where | what |
|---|---|
| `bundle.py`, `keys.py` | provisioning bundles: settings, scripts, certificates, keys |
| `client/` | a client's process, images, settings, rounds, certificates, state, privacy budget |
| `server/` | the server's process, connected clients, rounds, collected certificates |
| `messages.py`, `schemas.py` | messages, and what each may contain |
| `flower.py`, `gate.py` | Flower's processes and runs, and what others may ask of its server |
| `status.py` | the state of a server's or client's folder, or of a study |
| `client_app.py`, `server_app.py` | apps for a Flower deployment that is operated by others |

Only this package imports flwr, which the extra `certifl[flower]` installs.
"""
