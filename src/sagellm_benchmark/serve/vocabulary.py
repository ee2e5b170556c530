"""What prompts are made of: tokens of the server's own model, or words where it doesn't tell."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

from sagellm_benchmark.serve.http import HttpClient

_TEXT = """
able about above across after again air almost along also always among animal answer area arm around ask away back bad
bank base beach beautiful because become bed before begin behind believe best better between big bird black blue board
boat body book both bottom box boy bread bridge bright bring brother build busy call camp capital car card care carry
cat center certain chair change child choose church circle city class clean clear clock close cloud coast cold color
come common copy corn corner count country course cover cross cry current dance dark daughter day deal decide deep
desert develop different dinner doctor dog door double down draw dream dress drink drive dry during each ear early
earth east easy eat edge effect egg eight electric end energy engine enough enter evening event every example expect
eye face fact fair fall family famous far farm fast father feel field fight figure fill final find fine finger finish
fire first fish five floor flow flower fly follow food foot force forest form four free fresh friend front fruit full
game garden gas gate gentle girl give glass gold good grass great green ground group grow guess hair half hand happy
hard hat head hear heart heavy help here high hill history hold hole home horse hot hotel hour house human hundred
hunt hurry ice idea image inch include insect instant interest iron island job join journey jump keep key kind king
kitchen know lady lake land language large last late laugh law lead leaf learn leave left letter level lie life light
line list listen little live long look lost love low machine main make many map mark market master match matter meal
mean measure meat meet melody member metal middle milk mind minute mirror modern moment money month moon morning most
mother mountain mouth move much music name narrow nation nature near neck need never new next night nine noise north
nose note nothing notice number object ocean offer office oil old once open order other own oxygen page paint pair
paper parent park part party pass past path pattern pay people perfect period person phrase piano picture piece place
plain plan plane planet plant play please point pool poor port pose position possible power practice press pretty
print problem produce proper provide pull push put question quick quiet race radio rail rain raise range reach read
ready real reason receive record red region repeat reply rest result rich ride right ring rise river road rock room
root rope rose round row rule run safe sail salt same sand say scale school science score sea season seat second see
seed sell send sense sentence serve seven shape share sharp ship shoe shop shore short should shoulder show side sign
silent silver simple since sing sister sit six size skill skin sky sleep slow small smell smile snow soft soil soldier
song soon sound south space speak special speed spell spend spoke spot spread spring square stand star start state
station stay steam steel step stick still stone stop store storm story straight strange stream street string strong
student study subject sudden sugar suit summer sun supply sure surface surprise swim table tail take talk tall teach
team tell temple ten test thank thick thin thing think third thought thousand three tie time tiny tire together tone
tool top total touch toward town track trade train travel tree triangle trip trouble truck true try turn twenty two
type uncle under unit until use usual valley value vary very view village visit voice wait walk wall want warm wash
watch water wave wear weather week weight west wheel white whole wide wife wild will wind window wing winter wire wish
woman wonder wood word work world write wrong yard year yellow yes young zebra zero
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces that prompts are put together from.

    `token_ids` are ordinary tokens of the model, none that stands for a role or an end; empty where the server does not
    say. `tokens_per_word` is what one of `WORDS` takes on the average.
    """

    token_ids: tuple[int, ...] = ()
    tokens_per_word: float = 1.3  # the usual estimate for English

    @property
    def is_exact(self) -> bool:
        """Whether prompts of token ids have exactly the length that is wanted."""
        return bool(self.token_ids)

    def tokens(self, count: int, generator: random.Random) -> list[int]:
        """`count` random token ids."""
        return generator.choices(self.token_ids, k=count)

    def words(self, num_tokens: int, generator: random.Random) -> list[str]:
        """Random words of about `num_tokens` tokens, at least one."""
        return generator.choices(WORDS, k=max(1, round(num_tokens / self.tokens_per_word)))


class _Tokens(msgspec.Struct):
    tokens: list[int]


async def learn_vocabulary(client: HttpClient, model: str) -> Vocabulary:
    """Ask the server's `/tokenize`, which ours and vLLM have; without it lengths are estimates."""
    call = {"model": model, "prompt": " " + " ".join(WORDS), "add_special_tokens": False}
    async with client.call("POST", "/tokenize", msgspec.json.encode(call)) as answer:
        body = await answer.read()
        if answer.status != 200:
            return Vocabulary()
    try:
        tokens = msgspec.json.decode(body, type=_Tokens).tokens
    except msgspec.MsgspecError:  # another server's, with a form of its own
        return Vocabulary()
    return Vocabulary(tuple(sorted(set(tokens))), len(tokens) / len(WORDS)) if tokens else Vocabulary()
