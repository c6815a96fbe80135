from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core import config
from app.utils import guard

DENIED = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254
169.254.170.2 169.254.20.10 172.16.0.1 172.31.255.255 192.0.0.192 192.0.0.8 192.168.0.1 192.88.99.1 198.18.0.1
224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::10.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
::ffff:169.254.169.254 ::ffff:0:127.0.0.1 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254
64:ff9b:1::a00:1 100::1 2001:0:4136:e378:8000:63bf:f5ff:fffe 2001:2::1 2001:10::1 2001:20::1 2001:db8::1
2002:7f00:1::1 2002:a00:1::1 2002:a9fe:a9fe::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1
fe80::a9fe:a9fe fec0::1 ff02::1 ff0e::1 4000::1 e000::1
""".split()  # noqa: SIM905
PUBLIC = """
1.1.1.1 8.8.8.8 93.184.216.34 2606:4700:4700::1111 2001:4860:4860::8888 ::ffff:8.8.8.8 100.63.255.255 100.128.0.1
172.15.0.1 172.32.0.1 192.0.1.1 2001:200::1 2a00::1
""".split()  # noqa: SIM905
# Neighbours of the ranges' edges, from both sides.
EDGES_DENIED = """
0.255.255.255 100.127.255.255 192.0.0.255 192.0.2.255 192.31.196.0 192.52.193.255 192.175.48.255 198.19.255.255
198.51.100.0 203.0.113.255 2001:1ff:ffff::1 2620:4f:8000::1 3fff:fff::1 1fff:ffff::1 ::ffff:168.63.129.16
""".split()  # noqa: SIM905
EDGES_PUBLIC = """
1.0.0.0 9.255.255.255 11.0.0.0 126.255.255.255 128.0.0.0 168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0
191.255.255.255 198.17.255.255 198.20.0.0 223.255.255.255 2000::1 2001:db7::1 2001:db9::1 2003::1 2620:4f:8001::1
3ffe::1 3fff:1000::1
""".split()  # noqa: SIM905

STRICT = guard.EgressRules()
PRIVATE = guard.EgressRules(allow_private=True)
OPERATOR = guard.EgressRules(
    allowed_origins=frozenset(
        {guard.Origin("http", "receiver.hooks.svc", 8080), guard.Origin("https", "10.0.0.5", 8443)}
    ),
    blocked_cidrs=(ip_network("203.0.112.0/24"), ip_network("2a00:1::/32")),
)


def test_the_vectors_are_complete() -> None:
    assert (len(set(DENIED)), len(set(PUBLIC))) == (55, 13)


@pytest.mark.parametrize("text", DENIED + EDGES_DENIED)
def test_a_special_address_is_blocked(text: str) -> None:
    assert guard.blocked(ip_address(text)) is not None


@pytest.mark.parametrize("text", PUBLIC + EDGES_PUBLIC)
def test_a_public_address_is_not_blocked(text: str) -> None:
    assert guard.blocked(ip_address(text)) is None


@pytest.mark.parametrize("text", ["fe80::1%eth0", "2606:4700:4700::1111%1", "::ffff:8.8.8.8%lo"])
def test_an_address_with_a_zone_is_blocked(text: str) -> None:
    assert guard.blocked(ip_address(text)) == "an address with a zone"


@pytest.mark.parametrize("text", ["203.0.112.9", "::ffff:203.0.112.9", "2a00:1::7"])
def test_the_operators_own_ranges_are_blocked(text: str) -> None:
    assert guard.blocked(ip_address(text), OPERATOR.blocked_cidrs) is not None
    assert guard.blocked(ip_address(text)) is None


@settings(deadline=None)
@given(st.integers(0, 2**128 - 1))
def test_nothing_outside_2000_3_passes_but_mapped_public_ipv4(number: int) -> None:
    ip = ip_address(number.to_bytes(16, "big"))
    if guard.blocked(ip) is None:
        assert number >> 125 == 1 or number >> 32 == 0xFFFF


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_the_ipv4_address_in_it(ip: object) -> None:
    assert (guard.blocked(ip_address(f"::ffff:{ip}")) is None) == (guard.blocked(ip_address(str(ip))) is None)


@pytest.mark.parametrize("text", ["203.0.112.9", "::ffff:203.0.112.9"])
def test_private_mode_still_keeps_out_of_the_operators_ranges(text: str) -> None:
    rules = guard.EgressRules(allow_private=True, blocked_cidrs=OPERATOR.blocked_cidrs)
    assert rules.refusal(ip_address(text)) is not None
    assert rules.refusal(ip_address("127.0.0.1")) is None


@pytest.mark.parametrize(
    ("text", "admitted"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.com:443/Hook?a=B", "https://example.com/Hook?a=B"),
        ("https://example.com:8443/x", "https://example.com:8443/x"),
        ("https://example.com./x", "https://example.com/x"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),
        ("https://8.8.8.8/", "https://8.8.8.8/"),
        ("https://[2606:4700:4700::1111]/", "https://[2606:4700:4700::1111]/"),
        ("https://exam\nple.com/\n", "https://example.com/"),
        ("https://example.com/\x00a", "https://example.com/%00a"),
    ],
)
def test_a_public_https_url_is_admitted_in_its_normal_spelling(text: str, admitted: str) -> None:
    assert guard.admit_url(text, STRICT) == admitted


LOOPBACK_SPELLINGS = """
127.0.0.1 127.1 127.0.1 2130706433 017700000001 0x7f000001 0x7f.1 0177.1 0177.0x0.0x0.0x1 0x7f.0x0.0x00000000.0x01
0x0000007f.0x00000000.0x00000000.0x00000001 0 %31%32%37.0.0.1 127.0.0.1. \uff11\uff12\uff17.0.0.1 ①②⑦.0.0.1 127。0。0。1
[::1] [0000::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1] [febf:ffff::] [::ffff:0.0.0.1]
3232235777 [::ffff:192.0.2.1]
""".split()  # noqa: SIM905


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS)
@pytest.mark.parametrize("form", ["https://{}/", "https:\\\\{}\\", "https:{}", "  https://{}:8443/hook\n"])
def test_an_inner_address_is_refused_in_every_spelling(host: str, form: str) -> None:
    with pytest.raises(guard.ForbiddenUrlError, match="special address"):
        guard.admit_url(form.format(host), STRICT)


@pytest.mark.parametrize("text", DENIED)
def test_each_denied_address_is_refused_as_a_literal(text: str) -> None:
    host = f"[{text}]" if ":" in text else text
    with pytest.raises(guard.ForbiddenUrlError):
        guard.admit_url(f"https://{host}/", STRICT)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http://example.com/", "https"),
        ("https://example.com:80/", "port 443 or 8443"),
        ("https://example.com:22/", "port 443 or 8443"),
        ("https://localhost/", "public internet"),
        ("https://localhost./", "public internet"),
        ("https://localhost。/", "public internet"),
        ("https://intranet/", "public internet"),
        ("https:///x", "public internet"),
        ("https://metadata.google.internal/", "public internet"),
        ("https://printer.local/", "public internet"),
        ("https://a.localhost/", "public internet"),
        ("https://receiver.hooks.svc/", "public internet"),
        ("https://receiver.hooks.svc.cluster.local/", "public internet"),
        ("https://router.home.arpa/", "public internet"),
    ],
)
def test_a_url_that_leads_inside_is_forbidden(text: str, sentence: str) -> None:
    with pytest.raises(guard.ForbiddenUrlError, match=sentence):
        guard.admit_url(text, STRICT)


@pytest.mark.parametrize("rules", [STRICT, PRIVATE], ids=["strict", "private"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "http or https"),
        ("example.com/hook", "http or https"),
        ("ftp://example.com/", "http or https"),
        ("file:///etc/passwd", "http or https"),
        ("javascript:alert(1)", "http or https"),
        ("https://", "http or https"),
        ("https://example.com:99999/", "http or https"),
        ("https://exa mple.com/", "http or https"),
        ("https://x\x00y.example/", "http or https"),
        ("https://example.com/\ud800", "http or https"),
        ("https://xn--/", "http or https"),
        ("https://[::1%25lo]/", "http or https"),
        ("https://[127.0.0.1]/", "http or https"),
        ("https://[example.net]:1337/", "http or https"),
        ("https://1.2.3.4.5/", "http or https"),
        ("https://user:secret@example.com/", "user name"),
        ("https://user@example.com/", "user name"),
        ("https://:secret@example.com/", "user name"),
        ("https://user:secret@[::1]:9876/", "user name"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com/#", "fragment"),
        ("https://example.com:0/", "port 0"),
        ("https://a..b/", "labels"),
        ("https://example.com../", "labels"),
        (f"https://{'a' * 64}.example/", "labels"),
        (f"https://example.com/{'a' * 2048}", "2048"),
        (f"https://example.com/{'ü' * 1000}", "2048"),
    ],
)
def test_a_url_that_can_not_be_called_is_refused_whatever_the_rules(
    text: str, sentence: str, rules: guard.EgressRules
) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        guard.admit_url(text, rules)
    assert not isinstance(refused.value, guard.ForbiddenUrlError)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:3000/hook",
        "http://127.0.0.1:8000/",
        "http://[::1]:9/",
        "http://intranet/",
        "https://10.0.0.1:1/",
    ],
)
def test_private_mode_admits_http_any_port_and_private_hosts(text: str) -> None:
    assert guard.admit_url(text, PRIVATE) == text


@pytest.mark.parametrize("text", ["http://receiver.hooks.svc:8080/a", "https://10.0.0.5:8443/b"])
def test_an_allowed_origin_is_exempt(text: str) -> None:
    assert guard.admit_url(text, OPERATOR) == text


@pytest.mark.parametrize(
    "text",
    [
        "https://receiver.hooks.svc:8080/a",
        "http://receiver.hooks.svc:8081/a",
        "http://receiver.hooks.svc/a",
        "http://x.receiver.hooks.svc:8080/a",
        "https://10.0.0.5/b",
        "https://10.0.0.6:8443/b",
    ],
)
def test_only_the_exact_origin_is_exempt(text: str) -> None:
    with pytest.raises(guard.ForbiddenUrlError):
        guard.admit_url(text, OPERATOR)


@settings(deadline=None)
@given(
    st.text(max_size=60), st.sampled_from(["https://", "http://", "https:", ""]), st.sampled_from(["", ".com", ".com/"])
)
def test_whatever_is_sent_is_admitted_for_good_or_refused_with_a_sentence(text: str, start: str, end: str) -> None:
    for rules in (STRICT, PRIVATE):
        sentence = ""
        try:
            admitted = guard.admit_url(start + text + end, rules)
        except ValueError as refused:
            admitted, sentence = "", str(refused)
        if admitted:
            assert guard.admit_url(admitted, rules) == admitted
            assert len(admitted) <= guard.URL_LIMIT
            assert admitted.isascii()
        else:
            assert sentence.startswith("must ")


def test_the_settings_spell_the_rules() -> None:
    settings = config.Settings.model_construct(
        webhook_allow_private=False,
        webhook_allowed_origins=("https://Receiver.Hooks.svc:443", "http://[fd00::1]:8080"),
        webhook_blocked_cidrs=("203.0.112.0/24", "2a00:1::/32"),
    )
    rules = guard.EgressRules.from_settings(settings)
    assert rules.allowed_origins == {("https", "receiver.hooks.svc", 443), ("http", "fd00::1", 8080)}
    assert rules.blocked_cidrs == OPERATOR.blocked_cidrs
    assert guard.admit_url("https://receiver.hooks.svc/x", rules) == "https://receiver.hooks.svc/x"
    assert guard.admit_url("http://[fd00:0::1]:8080", rules) == "http://[fd00::1]:8080/"
    with pytest.raises(guard.ForbiddenUrlError):
        guard.admit_url("https://[2a00:1::1]/", rules)
