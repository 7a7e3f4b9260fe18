"""Real federations: the same algorithms with every client on a machine of its own, over Flower.

| file | what |
|---|---|
| `kit.py`, `keys.py` | what each party gets: certificates, keys, settings, scripts |
| `settings.py` | what a party decides for itself |
| `party.py`, `keeping.py` | a client's half: its rounds and certificates, what it keeps |
| `spending.py`, `allowance.py`, `book.py` | a party's own ledger of privacy |
| `crowd.py`, `remote.py`, `conduct.py` | the server's half: who is there, rounds, certificates |
| `messages.py`, `line.py` | what travels, and how |
| `link.py`, `node.py`, `running.py` | Flower's processes, and the work done for them |

Only this room imports flwr, which the extra `certifl[flower]` installs.
"""
