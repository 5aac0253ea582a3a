"""URIs of tracking stores: the user and the password in them, and texts that show neither."""

import re
from urllib.parse import quote, unquote

HIDDEN = "***"
SQLITE = "sqlite:///"  # before the path of a file
_LOCAL = (SQLITE, "file:")  # these have no password
# An @ behind host and port is no end of a password.
_HOST = re.compile(r"(\[[^\]]*\]|[^:@]*)(:[0-9]+)?")
# Libraries that do not see where a password ends show what stands between two of these.
_CUT = re.compile(r"[^\w.~-]+")
_SHORT = 4  # letters; shorter passwords may be parts of words by chance


def is_server(uri: str) -> bool:
    """Return whether a URI is that of a tracking server."""
    return uri.startswith(("http://", "https://"))


def split(uri: str) -> tuple[str, str, str]:
    """Return a URI without user and password, the user, and the password, both decoded.

    A password may be written as it is, with :, @, / or ?, unless what stands before them could be
    host and port.
    """
    scheme, separator, rest = uri.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" not in rest or _HOST.fullmatch(authority):
        return uri, "", ""
    path = re.split("[?#]", rest, maxsplit=1)[0]
    userinfo = (path if "@" in path else rest).rpartition("@")[0]
    rest = rest[len(userinfo) + 1 :]
    user, _, password = userinfo.partition(":")
    return scheme + separator + rest, unquote(user), unquote(password)


def place(uri: str) -> str:
    """Return what stays the same of the URI of a store when the password of a server changes."""
    return split(uri)[0].rstrip("/") if is_server(uri) else uri


def name(uri: str) -> str:
    """Return by what files of this project name a store: its URI without user and password."""
    return without_password(place(uri))


def joined(bare: str, user: str, password: str) -> str:
    """Return a URI with a user and a password, percent-encoded."""
    if not user and not password:
        return bare
    scheme, separator, rest = bare.partition("://")
    userinfo = quote(user, safe="") + (":" + quote(password, safe="") if password else "")
    return f"{scheme}{separator}{userinfo}@{rest}"


def without_password(uri: str) -> str:
    """Return a URI with everything hidden that may be a password or a part of one."""
    return _hide(uri)[0]


def scrubbed(text: str, uri: str) -> str:
    """Return a text, such as a library's error about a URI, without the passwords of the URI."""
    masked, secrets = _hide(uri)
    forms = {form for secret in secrets for form in _forms(secret)} - {"", uri}
    if not forms:
        return text
    patterns = [re.escape(uri)]
    for form in sorted(forms, key=len, reverse=True):
        alone = r"(?<!\w){}(?!\w)" if len(form) < _SHORT else "{}"
        patterns.append(alone.format(re.escape(form)))
    found = re.compile("|".join(patterns), re.IGNORECASE)  # hosts are shown in small letters
    return found.sub(lambda match: masked if match[0] == uri else HIDDEN, text)


def _hide(uri: str) -> tuple[str, list[str]]:
    """Return a URI without what may be secret, and that as it stands there."""
    if uri.startswith(_LOCAL):
        return uri, []
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    shown, *query = re.split("[?#]", rest, maxsplit=1)
    if query and "@" in query[0]:  # the ? may belong to a password, or the @ to a parameter
        password = rest.rpartition("@")[0].partition(":")[2]
        return scheme + separator + HIDDEN, [rest, password, *re.split("[&=]", rest)]
    secrets = [part.partition("=")[2] for part in "".join(query).split("&")]
    userinfo, at, host = shown.rpartition("@")
    if at:
        secrets.append(userinfo.partition(":")[2] or userinfo)
    masked = scheme + separator + (HIDDEN + at if at else "") + host
    return masked + (f"?{HIDDEN}" if query else ""), secrets


def _forms(secret: str) -> set[str]:
    """Return the forms in which a text may show a secret, and the parts of each."""
    whole = {secret, unquote(secret)}
    for one in list(whole):
        whole |= {quote(one, safe=""), quote(one), repr(one)[1:-1]}
    return whole | {part for one in whole for part in _CUT.split(one)}
