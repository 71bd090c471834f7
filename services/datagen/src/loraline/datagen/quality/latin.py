"""Which language a text in Latin letters is in, as far as telling English from others goes."""

from __future__ import annotations

from collections.abc import Mapping

import regex

# The commonest words of each language; few of them mean anything in the others.
_WORDS: Mapping[str, str] = {
    "en": (
        "the and of to is you that it for was on are with as i be this have from or had by but what were we "
        "when your can said there use an each which she do how their if will up about out many then them "
        "these so some her would make like has look more go see could my than been who its now did get may "
        "not at they he his"
    ),
    "fr": (
        "le les des une est et dans que qui pour pas vous je il elle nous avec ce cette sont mais sur être "
        "fait comme ou où très plus bien aux du au ça c'est"
    ),
    "de": (
        "der die das und ist nicht ich ein eine zu den mit sie auf für sich dem auch es als wie noch nach bei "
        "aus aber haben wird kann sind oder über mein"
    ),
    "es": (
        "el los las una es y en que por para con no se lo su del al más pero como está muy también todo "
        "porque cuando hay yo usted mi"
    ),
    "it": (
        "il gli una è e che di per non con sono della del alla anche come più ma questo perché molto cosa nel "
        "si ho hai lei"
    ),
    "pt": "o os uma é e que de para não com do da em você mais mas como está muito também isso",
    "nl": "het een en van ik niet dat zijn op te met voor maar ook je wij deze naar heb wordt",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya kamu anda adalah ke",
    "vi": "là và của có không được cho một những với các này trong tôi bạn người đã",
}
_COMMON = {language: frozenset(words.split()) for language, words in _WORDS.items()}
_WORD = regex.compile(r"[\p{Latin}']+")
FEWEST_WORDS = 8


def other_latin_language(text: str) -> str:
    """Return the language other than English that a text in Latin letters is in, or nothing.

    By the commonest words of nine languages: another one counts when it has three of them and more than twice as many
    as English. Texts of fewer than eight words are left alone.
    """
    words = _WORD.findall(text.casefold().replace("’", "'"))
    if len(words) < FEWEST_WORDS:
        return ""
    counts = {language: sum(word in common for word in words) for language, common in _COMMON.items()}
    english = counts.pop("en")
    language = max(counts, key=lambda name: counts[name])
    return language if counts[language] >= 3 and counts[language] > 2 * english else ""
