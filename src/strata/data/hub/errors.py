"""What went wrong with the hub, in one line that says what to do."""

from __future__ import annotations

from typing import Literal

from strata.errors import HubError, StrataError

Kind = Literal["dataset", "model"]


def explain(
    error: BaseException,
    repo: str,
    *,
    kind: Kind,
    revision: str | None = None,
    token_env: str | None = None,
) -> StrataError | None:
    """What an error of huggingface_hub, of datasets or of the network means for a user.

    Args:
        error: what was raised; what caused it is looked at too.
        repo: `owner/name`.
        kind: what the repository holds.
        revision: what was asked for.
        token_env: the environment variable that the token came from; None means that the hub's
            library found one by itself, or none.

    Returns:
        None where the error is of another kind.
    """
    from huggingface_hub import errors, get_token, is_offline_mode

    causes = _causes(error)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    what = f"{'data set' if kind == 'dataset' else 'model'} {repo}"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    again = "or give a folder that it was downloaded to"
    if has(errors.GatedRepoError):
        if token_env or get_token():
            return HubError(
                f"the {what} is gated and the token in {token_env or 'HF_TOKEN'} may not read it: "
                f"ask for access at {page} with the account of the token"
            )
        return HubError(
            f"the {what} is gated: accept its terms at {page}, make a token at "
            "https://huggingface.co/settings/tokens and put it into HF_TOKEN"
        )
    if has(errors.RevisionNotFoundError):
        return HubError(f"the {what} has no revision {revision!r}: see {page}/tree/main")
    if has(errors.RepositoryNotFoundError, errors.HFValidationError):
        return HubError(
            f"no {what} on the hub, and no file or folder of that name here; if it is private, "
            "put a token that may read it into HF_TOKEN"
        )
    # datasets wraps both ways of not reaching the hub in a ConnectionError without a cause.
    if has(errors.OfflineModeIsEnabled) or (has(ConnectionError) and is_offline_mode()):
        return HubError(
            f"the {what} is on the hub, and HF_HUB_OFFLINE says not to ask it: unset that, {again}"
        )
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            status = getattr(cause.response, "status_code", "an error")
            return HubError(f"the hub answered {status} for the {what}: try again later")
    # The base of every error of the HTTP library, whichever one huggingface_hub uses.
    http_error = errors.HfHubHTTPError.__bases__[0]
    if has(http_error, ConnectionError, errors.LocalEntryNotFoundError):
        return HubError(
            f"the hub cannot be reached for the {what}: see to the network and run the same "
            f"command again, {again}"
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from: libraries wrap the telling ones."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
