"""The paper's claims put to the test on stored runs: effect, interval, verdict."""

from certifl.paper.claims.catalogue import CLAIMS, ClaimResult, Report, check_claims
from certifl.paper.claims.render import claim_rows, explanation, verdicts_section, write_claims
from certifl.paper.claims.runs import find_runs

__all__ = [
    "CLAIMS",
    "ClaimResult",
    "Report",
    "check_claims",
    "claim_rows",
    "explanation",
    "find_runs",
    "verdicts_section",
    "write_claims",
]
