"""Access tokens that say by a prefix whose they are: one RE2 alternation behind a word boundary.

Each row is a vendor's documented shape, or what its tokens look like. A prefix that is a word of
its own needs a body which no identifier or slug has: a length, hexadecimal digits. Rows begin with
a literal where they can, so that Python's `re` passes over them by their first byte.
"""

from __future__ import annotations

from typing import Final

_ROWS: Final = (
    # source code and packages
    rb"(?:gh[pousr]|ghs)_[A-Za-z0-9]{36,}", rb"github_pat_[A-Za-z0-9_]{60,}",
    rb"gl(?:pat|dt|rtr?|cbt|ptt|ft|agent|oas|soat|imt|ffct|wt)-[0-9A-Za-z_-]{20,}"
    rb"(?:\.[0-9A-Za-z]{2}\.[0-9a-z]{9})?",
    rb"GR1348941[0-9A-Za-z_-]{20}", rb"npm_[0-9A-Za-z]{36}\b", rb"pypi-[0-9A-Za-z_-]{50,}",
    rb"rubygems_[0-9a-f]{48}\b", rb"cio[0-9A-Za-z]{32}\b", rb"oy2[0-9a-z]{43}\b",
    rb"CLOJARS_[0-9a-z]{60}\b", rb"dckr_[op]at_[0-9A-Za-z_-]{27,}",
    rb"AT(?:ATT|CTT)3[0-9A-Za-z_=-]{60,}",
    rb"ATBB[0-9A-Za-z]{32}", rb"AKC[0-9A-Za-z]{64,}", rb"cmVmd[0-9A-Za-z]{59}\b",
    rb"sgp_(?:[0-9a-f]{16}_|local_)?[0-9a-f]{40}\b", rb"bkua_[0-9a-f]{40}\b",
    rb"CCIP(?:AT|RJ)_[0-9A-Za-z]{22}_[0-9a-f]{40}\b", rb"pul-[0-9a-f]{40}\b",
    rb"pnu_[0-9A-Za-z]{36}\b", rb"dp\.(?:pt|st|ct|sa|scim|audit)\.[0-9A-Za-z.-]{40,}",
    # clouds
    rb"AIza[0-9A-Za-z_-]{35}", rb"ya29\.[0-9A-Za-z_-]{20,}", rb"GOCSPX-[0-9A-Za-z_-]{28}",
    rb"1//0[0-9A-Za-z_-]{40,}", rb"do[opr]_v1_[0-9a-f]{64}\b", rb"LTAI[0-9A-Za-z]{12,24}\b",
    rb"AKID[0-9A-Za-z]{32}\b", rb"AQVN[0-9A-Za-z_-]{35,}", rb"HRKU-[0-9A-Za-z_-]{36,}",
    rb"hv[sb]\.[0-9A-Za-z_-]{24,}", rb"[0-9A-Za-z]{14}\.atlasv1\.[0-9A-Za-z_-]{60,}",
    rb"pscale_(?:tkn|pw|oauth)_[0-9A-Za-z=._-]{32,}", rb"sbp_[0-9a-f]{40}\b",
    rb"sb_secret_[0-9A-Za-z_-]{24,}", rb"fm[12][ar]?_[0-9A-Za-z+/]{60,}={0,2}",
    rb"tskey-[a-z]{3,7}-[0-9A-Za-z-]{20,}", rb"v1\.0-[0-9a-f]{24}-[0-9a-f]{146}\b",
    rb"dapi[0-9a-f]{32}(?:-\d)?\b", rb"ops_eyJ[0-9A-Za-z+/_-]{100,}={0,2}",
    # models
    rb"sk-[0-9A-Za-z_-]{32,}", rb"hf_[0-9A-Za-z]{34}\b", rb"api_org_[0-9A-Za-z]{34}\b",
    rb"r8_[0-9A-Za-z]{37}\b", rb"gsk_[0-9A-Za-z]{40,}", rb"xai-[0-9A-Za-z]{60,}",
    rb"pplx-[0-9A-Za-z]{40,}", rb"csk-[0-9a-z]{40,}", rb"tgp_v1_[0-9A-Za-z_-]{40,}",
    rb"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}\b", rb"nvapi-[0-9A-Za-z_-]{40,}",
    rb"pcsk_[0-9A-Za-z]{5,8}_[0-9A-Za-z]{40,}",
    # messages and mail
    rb"(?:xoxe\.)?xox[abeoprs]-[0-9A-Za-z-]{10,}", rb"xapp-\d-[0-9A-Za-z-]{20,}",
    rb"hooks\.slack\.com/(?:services|workflows|triggers)/[TE][A-Z0-9]+/[A-Z0-9]+/[0-9A-Za-z/]{16,}",
    rb"SG\.[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}", rb"(?:SK|AC)[0-9a-f]{32}\b",
    rb"key-[0-9a-f]{32}\b", rb"[0-9a-f]{32}-us\d{1,2}\b", rb"xkeysib-[0-9a-f]{64}-[0-9A-Za-z]{16}",
    rb"xsmtpsib-[0-9a-f]{64}-[0-9A-Za-z]{16}", rb"re_[0-9A-Za-z]{8}_[0-9A-Za-z]{24}\b",
    rb"\d{8,10}:AA[0-9A-Za-z_-]{33}\b",
    rb"[MNO][0-9A-Za-z_-]{23,27}\.[0-9A-Za-z_-]{6}\.[0-9A-Za-z_-]{27,38}\b",
    # money
    rb"[sr]k_(?:live|test)_[0-9A-Za-z]{16,}", rb"whsec_[0-9A-Za-z+/]{24,}={0,2}",
    rb"sq0(?:atp|csp)-[0-9A-Za-z_-]{22,}", rb"EAA[0-9A-Za-z_-]{60,}",
    rb"shp(?:at|ca|pa|ss)_[0-9A-Fa-f]{32}\b", rb"rzp_(?:live|test)_[0-9A-Za-z]{14}\b",
    rb"FLWSECK(?:_TEST)?-[0-9A-Za-z]{32}-X\b", rb"shippo_(?:live|test)_[0-9a-f]{40}\b",
    rb"duffel_(?:live|test)_[0-9A-Za-z_-]{40,}", rb"EZ[AT]K[0-9A-Za-z]{54}\b",
    rb"access-(?:sandbox|development|production)-[0-9a-f]{8}-[0-9a-f-]{27}\b",
    # work
    rb"lin_(?:api|oauth)_[0-9A-Za-z]{32,}", rb"secret_[0-9A-Za-z]{43}\b", rb"ntn_[0-9A-Za-z]{40,}",
    rb"figd_[0-9A-Za-z_-]{40,}", rb"pat[0-9A-Za-z]{14}\.[0-9a-f]{64}\b",
    rb"tfp_[0-9A-Za-z_.-]{40,}",
    rb"CFPAT-[0-9A-Za-z_-]{43}", rb"PMAK-[0-9a-f]{24}-[0-9a-f]{34}\b", rb"rdme_[0-9a-z]{70}\b",
    rb"s-s4t2ud-[0-9a-f]{64}\b", rb"zpka_[0-9A-Za-z]{32}_[0-9A-Za-z]{8}\b",
    # watching
    rb"glsa_[0-9A-Za-z_]{32,}", rb"glc_[0-9A-Za-z+/]{32,}={0,2}",
    rb"NR(?:AK|II|JS|RA)-[0-9A-Za-z_-]{19,}",
    rb"dt0[a-z]\d\d\.[0-9A-Z]{24}\.[0-9A-Z]{64}\b", rb"sntrys_[0-9A-Za-z+/=_-]{60,}",
    rb"sntryu_[0-9a-f]{64}\b", rb"aio_[0-9A-Za-z]{28}\b",
)  # fmt: skip

TOKENS: Final = rb"\b(?:" + b"|".join(_ROWS) + rb")"
