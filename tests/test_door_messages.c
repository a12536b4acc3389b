/* What the gRPC door makes of messages: wishes, refusals, checks of what comes from outside; the tokenizer's bundle. */
#include "cluster/bundle.h"
#include "cluster/door_internal.h"
#include "cluster/wire_check.h"
#include "tests/support.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    wish_room room;
    request_wish wish;
    answer_wish want;
    refusal why;
} taken;

static refusal_kind take(const Vllm__GenerateRequest *m, taken *t)
{
    *t = (taken){0};
    return inference_wish(m, &t->room, &t->wish, &t->want, &t->why);
}

static Vllm__GenerateRequest text_request(void)
{
    Vllm__GenerateRequest m = VLLM__GENERATE_REQUEST__INIT;
    m.prompt_case = VLLM__GENERATE_REQUEST__PROMPT_TEXT;
    m.text = (ProtobufCBinaryData){2, (uint8_t *)"hi"};
    return m;
}

static void nothing_said_is_the_protocols_default(void **state)
{
    (void)state;
    taken t;
    Vllm__GenerateRequest m = text_request();
    assert_int_equal(take(&m, &t), REFUSAL_NONE);
    assert_true(t.wish.has_text && t.wish.add_special && t.wish.text_size == 2);
    assert_int_equal(t.wish.max_new, 20);
    assert_int_equal(t.wish.owner, -1);
    assert_int_equal(t.wish.n, 0);
    assert_false(t.wish.has_temperature || t.wish.has_top_k || t.wish.has_top_p || t.wish.has_seed);
    assert_false(t.wish.no_text || t.wish.keep_special || t.wish.prompt_logprobs || t.wish.bypass_prefix_cache);
    assert_null(t.wish.cache_salt);
    assert_true(t.want.text);
    assert_false(t.want.prompt_ids || t.want.prompt_logprobs || t.want.token_ids || t.want.logprobs || t.want.candidates);
    arena_clear(&t.room.memory);
}

static void zero_temperature_is_said_absent_is_not(void **state)
{
    (void)state;
    taken t;
    Vllm__GenerateRequest m = text_request();
    m._temperature_case = VLLM__GENERATE_REQUEST___TEMPERATURE_TEMPERATURE;
    assert_int_equal(take(&m, &t), REFUSAL_NONE);
    assert_true(t.wish.has_temperature);
    assert_true(t.wish.temperature == 0);
}

static void numbers_beyond_int_are_cut_ids_beyond_are_refused(void **state)
{
    (void)state;
    taken t;
    uint32_t ids[] = {1, 0x80000000u};
    Vllm__GenerateRequest m = text_request();
    Vllm__StoppingCriteria stopping = VLLM__STOPPING_CRITERIA__INIT;
    m.stopping = &stopping;
    m.truncate_prompt_tokens = stopping.max_new_tokens = stopping.min_new_tokens = UINT32_MAX;
    assert_int_equal(take(&m, &t), REFUSAL_NONE);
    assert_int_equal(t.wish.max_new, INT_MAX);
    assert_int_equal(t.wish.min_new, INT_MAX);
    assert_int_equal(t.wish.truncate_prompt, INT_MAX);
    stopping.stop_token_ids = ids;
    stopping.n_stop_token_ids = 1;
    assert_int_equal(take(&m, &t), REFUSAL_NONE);
    assert_int_equal(t.wish.n_stop_ids, 1);
    stopping.n_stop_token_ids = 2;
    assert_int_equal(take(&m, &t), REFUSAL_BAD);
    assert_non_null(strstr(t.why.sentence, "stop_token_ids"));
    assert_non_null(strstr(t.why.sentence, "2147483648"));
}

static void candidates_alone_ask_for_the_prompts_logprobs_too(void **state)
{
    (void)state;
    taken t;
    Vllm__GenerateRequest m = text_request();
    Vllm__ResponseOptions options = VLLM__RESPONSE_OPTIONS__INIT;
    Vllm__CandidateTokens five = VLLM__CANDIDATE_TOKENS__INIT, none = VLLM__CANDIDATE_TOKENS__INIT;
    five.select_case = VLLM__CANDIDATE_TOKENS__SELECT_TOP_N;
    five.top_n = 5;
    m.response = &options;
    options.prompt_candidates = &five;
    options.output_candidates = &none;
    assert_int_equal(take(&m, &t), REFUSAL_NONE);
    assert_int_equal(t.wish.prompt_candidates.top_n, 5);
    assert_true(t.wish.prompt_logprobs && t.want.prompt_candidates);
    assert_false(t.want.prompt_logprobs || t.want.candidates);
}

static void an_engine_request_wants_tokens_not_text(void **state)
{
    (void)state;
    taken t = {0};
    uint32_t ids[] = {4, 5};
    Vllm__Grpc__Engine__GenerateRequest m = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INIT;
    Vllm__Grpc__Engine__TokenizedInput input = VLLM__GRPC__ENGINE__TOKENIZED_INPUT__INIT;
    Vllm__Grpc__Engine__SamplingParams sampling = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__INIT;
    input.input_ids = ids;
    input.n_input_ids = 2;
    m.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED;
    m.tokenized = &input;
    assert_int_equal(engine_wish(&m, 100, &t.room, &t.wish, &t.want, &t.why), REFUSAL_NONE);
    assert_true(t.wish.no_text && !t.wish.has_text);
    assert_int_equal(t.wish.max_new, 0); /* as many as fit */
    m.sampling_params = &sampling;
    sampling._truncate_prompt_tokens_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS___TRUNCATE_PROMPT_TOKENS_TRUNCATE_PROMPT_TOKENS;
    sampling.truncate_prompt_tokens = -1;
    sampling._seed_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS___SEED_SEED;
    sampling.seed = -2;
    sampling._logprobs_case = VLLM__GRPC__ENGINE__SAMPLING_PARAMS___LOGPROBS_LOGPROBS;
    sampling.logprobs = -1;
    assert_int_equal(engine_wish(&m, 100, &t.room, &t.wish, &t.want, &t.why), REFUSAL_NONE);
    assert_int_equal(t.wish.truncate_prompt, 99);
    assert_true(t.wish.has_seed && t.wish.seed == UINT64_MAX - 1);
    assert_true(t.wish.output_candidates.all && t.want.logprobs && t.want.candidates);
    arena_clear(&t.room.memory);
}

static void every_refusal_has_its_code(void **state)
{
    (void)state;
    assert_int_equal(door_code(REFUSAL_BAD), RPC_INVALID_ARGUMENT);
    assert_int_equal(door_code(REFUSAL_TOO_LARGE), RPC_INVALID_ARGUMENT);
    assert_int_equal(door_code(REFUSAL_NOT_FOUND), RPC_NOT_FOUND);
    assert_int_equal(door_code(REFUSAL_EXISTS), RPC_ALREADY_EXISTS);
    assert_int_equal(door_code(REFUSAL_FULL), RPC_RESOURCE_EXHAUSTED);
    assert_int_equal(door_code(REFUSAL_UNAVAILABLE), RPC_UNAVAILABLE);
    assert_int_equal(door_code(REFUSAL_UNSUPPORTED), RPC_UNIMPLEMENTED);
    assert_int_equal(door_code(REFUSAL_NOT_ALLOWED), RPC_PERMISSION_DENIED);
    assert_int_equal(door_code(REFUSAL_INTERNAL), RPC_INTERNAL);
}

static void only_utf8_is_a_character(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        size_t size, character;
    } cases[] = {
        {"a", 1, 1},
        {"", 0, 0},
        {"\0", 1, 1},
        {"\xc3\xa9", 2, 2},
        {"\xc3", 1, 0},
        {"\xe2\x82\xac", 3, 3},
        {"\xe2\x82", 2, 0},
        {"\xf0\x9f\x98\x80", 4, 4},
        {"\x80", 1, 0},
        {"\xc0\x80", 2, 0},
        {"\xed\xa0\x80", 3, 0},
        {"\xf4\x90\x80\x80", 4, 0},
        {"\xe0\x80\x80", 3, 0},
        {"\xff", 1, 0},
        {"\xf4\x8f\xbf\xbf", 4, 4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        assert_int_equal(utf8_character((const uint8_t *)cases[i].bytes, cases[i].size), cases[i].character);
}

static void cut_off_messages_are_damage_at_every_length(void **state)
{
    (void)state;
    Vllm__GenerateRequest m = text_request();
    m.request_id = "an id";
    m.model = "a model";
    uint8_t bytes[100];
    size_t size = vllm__generate_request__pack(&m, bytes);
    assert_int_equal(wire_check(&vllm__generate_request__descriptor, bytes, size), STATUS_OK);
    int n_whole = 0; /* a cut between two fields leaves a message */
    for (size_t n = 0; n < size; n++)
        n_whole += wire_check(&vllm__generate_request__descriptor, bytes, n) == STATUS_OK;
    assert_int_equal(n_whole, 3);
}

static void sha256_gives_the_published_values(void **state)
{
    (void)state;
    static const struct {
        const char *text, *expected;
    } cases[] = {
        /* FIPS 180-4's examples */
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    char hex[65];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        sha256_hex(cases[i].text, strlen(cases[i].text), hex);
        assert_string_equal(hex, cases[i].expected);
    }
    char *million = malloc(1000000);
    memset(million, 'a', 1000000);
    sha256_hex(million, 1000000, hex);
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

static void a_folder_without_a_tokenizer_makes_no_bundle(void **state)
{
    (void)state;
    bytes_writer out = {0};
    assert_int_equal(bundle_tokenizer(support_source("tests/data/fuzz"), &out), STATUS_BAD_INPUT);
    assert_int_equal(bundle_tokenizer("/no/such/folder", &out), STATUS_IO);
    bytes_clear(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"what is not said is the protocol's default", nothing_said_is_the_protocols_default, NULL, NULL, NULL},
        {"temperature 0 is said, an absent one is not", zero_temperature_is_said_absent_is_not, NULL, NULL, NULL},
        {"numbers beyond int are cut, token ids beyond it refused", numbers_beyond_int_are_cut_ids_beyond_are_refused, NULL, NULL,
         NULL},
        {"candidates alone ask for the prompt's logprobs too", candidates_alone_ask_for_the_prompts_logprobs_too, NULL, NULL,
         NULL},
        {"an engine request wants tokens, not text", an_engine_request_wants_tokens_not_text, NULL, NULL, NULL},
        {"every refusal has its code", every_refusal_has_its_code, NULL, NULL, NULL},
        {"only UTF-8 is a character", only_utf8_is_a_character, NULL, NULL, NULL},
        {"a message cut off inside a field is damage", cut_off_messages_are_damage_at_every_length, NULL, NULL, NULL},
        {"sha256 gives the published values", sha256_gives_the_published_values, NULL, NULL, NULL},
        {"a folder without a tokenizer makes no bundle", a_folder_without_a_tokenizer_makes_no_bundle, NULL, NULL, NULL},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
