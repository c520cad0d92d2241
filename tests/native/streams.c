/* Windows of streams that two threads fetch, by interleavings (the second one stops within a piece) and beside changes of the file;
 * when there are two, with a clock of the test's own; and what becomes of their memory, and of requests'.
 *
 *     streams SEGMENT */
#include "reader_ahead.h"
#include "reader_buffers.h"
#include "expect.h"
#include "witness.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WITHIN_PIECE = 98, FH = 5, PAGES = 512, WINDOW = 64, WINDOWS = PAGES / WINDOW };

static _Thread_local bool leads;
static _Atomic bool stops, reached, go;

static void nap(void) { nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL); }

void kill_point(int n)
{
    if (n != WITHIN_PIECE || leads || !atomic_load(&stops))
        return;
    atomic_store(&reached, true);
    while (!atomic_load(&go))
        nap();
    atomic_store(&stops, false);
}

struct world {
    struct hits hits;
    struct gate *gate;
    struct tm_handle pool;
    struct ahead ahead;
    uint8_t oid[TM_OID];
    _Atomic uint64_t version; /* of all pages, once it is put */
};

static void say(struct world *w, bool open) { gate_set(w->gate, w->oid, (uint64_t)PAGES * TM_PAGE, open, true); }

static void put_all(struct world *w)
{
    uint8_t page[TM_PAGE];
    for (uint32_t i = 0; i < PAGES; i++) {
        page_make(page, i, atomic_load(&w->version));
        if (tm_put(&w->pool, w->oid, i, page, 1, KEEP_NOTHING) != 1)
            exit(2);
    }
}

static uint8_t data[WINDOW * TM_PAGE];

static bool all_right(const uint8_t *bytes, uint32_t first, uint64_t version)
{
    bool right = true;
    for (uint32_t i = 0; i < WINDOW; i++)
        right &= page_is(bytes + (size_t)i * TM_PAGE, first + i, version);
    return right;
}

static void begin(struct world *w, uint32_t first)
{
    struct target t;
    memset(data, 0, sizeof data);
    if (!hits_expect(&w->hits, FH, (uint64_t)first * TM_PAGE, WINDOW * TM_PAGE, &t))
        exit(2);
    window_begin(&w->ahead.window, &t, first, WINDOW, data);
}

/* The second thread has claimed a piece, and stopped there. */
static void begin_with_second(struct world *w, uint32_t first)
{
    begin(w, first);
    atomic_store(&reached, false);
    atomic_store(&go, false);
    atomic_store(&stops, true);
    window_lend(&w->ahead.window);
    for (int i = 0; i < 25000 && !atomic_load(&reached); i++)
        nap();
    expect(atomic_load(&reached), "the second one fetched nothing");
}

static bool ends_at_last(struct world *w)
{
    atomic_store(&go, true);
    for (int i = 0; i < 25000; i++, nap())
        if (window_end(&w->ahead.window))
            return true;
    return false;
}

static void fetched_by_one(struct world *w)
{
    struct window *window = &w->ahead.window;
    begin(w, 7);
    window_fetch(window);
    expect(window_whole(window) && all_right(data, 7, 1), "wrong bytes");
    expect(window_end(window) && window_end(window), "it does not end");
    expect(!window->has_second, "a thread was started for nothing");
}

static void fetched_by_two(struct world *w)
{
    struct window *window = &w->ahead.window;
    begin_with_second(w, 3);
    window_fetch(window);
    expect(!window_whole(window), "whole without a piece");
    atomic_store(&go, true);
    bool whole = false;
    for (int i = 0; i < 25000 && !whole; i++, nap())
        whole = window_whole(window);
    expect(whole && all_right(data, 3, 1), "wrong bytes");
    expect(window_end(window), "it does not end");
}

/* What is in the second one's hands keeps the memory. */
static void ended_while_the_second_fetches(struct world *w)
{
    struct window *window = &w->ahead.window;
    begin_with_second(w, 0);
    expect(!window_end(window), "it has ended while a piece was fetched");
    expect(!window_end(window), "it has ended the second time it was asked");
    expect(ends_at_last(w), "it does not end");
    begin(w, 100);
    window_fetch(window);
    expect(window_whole(window) && all_right(data, 100, 1), "wrong bytes in the next one");
}

/* The last reply may still be sent from that memory. */
static void nothing_is_fetched_that_is_not_lent(struct world *w)
{
    struct window *window = &w->ahead.window;
    static const uint8_t none[sizeof data];
    begin_with_second(w, 0);
    window_take_back(window);
    expect(ends_at_last(w), "it does not end");
    begin(w, 20);
    sem_post(&window->called); /* it may come late */
    for (int i = 0; i < 50; i++)
        nap();
    expect(!memcmp(data, none, sizeof data), "something was fetched");
    window_fetch(window);
    expect(window_whole(window) && all_right(data, 20, 1), "wrong bytes");
}

static void a_page_is_missing(struct world *w)
{
    struct window *window = &w->ahead.window;
    (void)tm_flush(&w->pool, w->oid, 40, 1);
    for (int lent = 0; lent < 2; lent++) {
        begin(w, 0);
        if (lent)
            window_lend(window);
        window_fetch(window);
        expect(!window_whole(window), "whole without a page");
        expect(ends_at_last(w), "it does not end");
    }
}

static _Atomic bool over;
static _Atomic unsigned turns; /* of the reader below */

/* It changes after a number of the reader's turns, not after a time, in which a reader that has no CPU gets nothing done. */
static void *change(void *arg)
{
    struct world *w = arg;
    while (!atomic_load(&over)) {
        say(w, false);
        (void)tm_flush(&w->pool, w->oid, 0, PAGES);
        atomic_fetch_add(&w->version, 1);
        put_all(w);
        say(w, true);
        unsigned last = atomic_load(&turns) + (unsigned)atomic_load(&w->version) % 8;
        do
            nap();
        while (!atomic_load(&over) && (int)(atomic_load(&turns) - last) < 0);
    }
    return NULL;
}

/* A stream as the reader reads it, while the file changes: each answer is what the file had at some time while it was asked for. */
static void beside_changes(struct world *w)
{
    pthread_t thread;
    unsigned answered = 0;
    time_t end = time(NULL) + 30;
    w->ahead.judge = (struct judge){.windows = JUDGE_TURN * JUDGE_TURNS, .helps = true};
    if (pthread_create(&thread, NULL, change, w))
        exit(2);
    for (unsigned i = 0; answered < 2000 && time(NULL) < end; i++) {
        uint32_t first = i % (WINDOWS - 1) * WINDOW;
        struct fuse_read_in read_in = {.fh = FH, .offset = (uint64_t)first * TM_PAGE, .size = WINDOW * TM_PAGE};
        struct answer answer;
        uint64_t before = atomic_load(&w->version), version = 0;
        if (ahead_has(&w->ahead, &w->hits, &read_in, &answer)) {
            version = atomic_load(&w->version);
            while (version > before && !all_right(answer.bytes, first, version))
                version--;
            expect(all_right(answer.bytes, first, version), "bytes of another time");
            answered++;
        }
        if (ahead_expects(&w->ahead, &read_in))
            ahead_begin(&w->ahead, &w->hits, &read_in, true);
        if (version) /* it is being sent, while the second one fetches */
            expect(all_right(answer.bytes, first, version), "an answer was overwritten");
        ahead_fetch(&w->ahead, i % 16 == 0);
        atomic_fetch_add(&turns, 1);
    }
    expect(answered, "nothing was fetched ahead");
    expect(w->ahead.window.has_second, "one thread did it all");
    atomic_store(&over, true);
    pthread_join(thread, NULL);
}

/* Flags of the mapping that has `address`, as /proc/self/smaps has them. */
static bool has_flag(const void *address, const char *flag)
{
    char line[512];
    bool within = false, has = false;
    FILE *maps = fopen("/proc/self/smaps", "re");
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            within = from <= (uintptr_t)address && (uintptr_t)address < to;
        else if (within && !strncmp(line, "VmFlags:", 8))
            has = strstr(line, flag) != NULL;
    }
    if (maps)
        fclose(maps);
    return has;
}

/* Whether the kernel has any just then is its affair. */
static void huge_pages_are_asked_for(struct world *w)
{
    enum { HUGE_BYTES = 2 << 20 };
    struct fuse_read_in read_in = {.fh = FH, .size = WINDOW * TM_PAGE};
    struct room *room = &w->ahead.large;
    expect(!room->memory, "memory for no stream");
    ahead_begin(&w->ahead, &w->hits, &read_in, false);
    expect(room->bytes == HUGE_BYTES, "not one of them for two windows");
    expect((uintptr_t)room->memory % HUGE_BYTES == 0, "it begins within one");
    if (!access("/sys/kernel/mm/transparent_hugepage", F_OK))
        expect(has_flag(room->memory, " hg"), "they are not asked for");
    memset(room->memory, 1, room->bytes);
}

static bool is_mapped(const void *page)
{
    unsigned char there;
    return !mincore((void *)page, TM_PAGE, &there);
}

/* The window of `npages` that follows a READ before page `first` is fetched. */
static void fetch_after(struct world *w, uint32_t first, uint32_t npages)
{
    struct fuse_read_in read_in = {.fh = FH, .offset = (uint64_t)(first - npages) * TM_PAGE, .size = npages * TM_PAGE};
    ahead_begin(&w->ahead, &w->hits, &read_in, false);
    ahead_fetch(&w->ahead, false);
}

static bool is_there(struct world *w, uint32_t first, uint32_t npages, uint64_t version)
{
    struct fuse_read_in read_in = {.fh = FH, .offset = (uint64_t)first * TM_PAGE, .size = npages * TM_PAGE};
    struct answer answer;
    if (!ahead_has(&w->ahead, &w->hits, &read_in, &answer))
        return false;
    for (uint32_t i = 0; i < npages; i++)
        expect(page_is(answer.bytes + (size_t)i * TM_PAGE, first + i, version), "wrong bytes");
    return true;
}

static void small_windows_take_little(struct world *w)
{
    enum { NPAGES = 16 };
    fetch_after(w, NPAGES, NPAGES);
    expect(!w->ahead.large.memory, "a huge page for windows of 64 KiB");
    expect(w->ahead.small.bytes == 2 * NPAGES * TM_PAGE && !has_flag(w->ahead.small.memory, " hg"), "as large, or as huge");
    expect(is_there(w, NPAGES, NPAGES, 1), "it is not there");
    fetch_after(w, WINDOW, WINDOW);
    expect(w->ahead.large.memory && is_there(w, WINDOW, WINDOW, 1), "the next one is larger");
    fetch_after(w, 3 * NPAGES, NPAGES);
    expect(is_there(w, 3 * NPAGES, NPAGES, 1), "and the next one smaller again");
}

static void memory_goes_back(struct world *w)
{
    struct ahead *a = &w->ahead;
    for (unsigned i = 0; i < 2; i++) {
        fetch_after(w, WINDOW, WINDOW);
        const uint8_t *memory = a->large.memory;
        ahead_rest(a, false);
        expect(a->large.memory == memory && is_there(w, WINDOW, WINDOW, 1), "what was begun since the last time is gone");
        fetch_after(w, 16, 16); /* a stream of small windows goes on */
        ahead_rest(a, false);
        expect(!a->large.memory && !is_mapped(memory), "what was not used is kept");
        expect(is_there(w, 16, 16, 1), "so is the other stream");
    }
    fetch_after(w, WINDOW, WINDOW);
    const uint8_t *memory = a->large.memory, *small = a->small.memory;
    ahead_rest(a, true);
    expect(!is_mapped(memory) && !is_mapped(small), "not all is given back");
    expect(!is_there(w, WINDOW, WINDOW, 1), "a window without memory");
    fetch_after(w, WINDOW, WINDOW);
    expect(is_there(w, WINDOW, WINDOW, 1), "there is no memory any more");
}

static void memory_stays_while_the_second_fetches(struct world *w)
{
    struct ahead *a = &w->ahead;
    struct fuse_read_in read_in = {.fh = FH, .size = WINDOW * TM_PAGE};
    ahead_begin(a, &w->hits, &read_in, false);
    const uint8_t *memory = a->large.memory;
    atomic_store(&reached, false);
    atomic_store(&go, false);
    atomic_store(&stops, true);
    window_lend(&a->window);
    for (int i = 0; i < 25000 && !atomic_load(&reached); i++)
        nap();
    expect(atomic_load(&reached), "the second one fetched nothing");
    ahead_rest(a, true);
    bool stays = is_mapped(memory);
    expect(stays, "it would write where nothing is");
    if (!stays)
        exit(1);
    expect(ends_at_last(w), "it does not end");
    ahead_rest(a, true);
    expect(!is_mapped(memory), "it is kept for ever");
}

static void buffers_go_back(struct world *w)
{
    enum { SIZE = 1 << 20, COUNT = 3 };
    struct buffers *all = buffers_new(SIZE);
    struct buffer *taken[COUNT];
    const uint8_t *memory[COUNT];
    (void)w;
    for (unsigned i = 0; i < COUNT; i++) {
        taken[i] = buffer_take(all, 0);
        memset(taken[i]->data, 1, SIZE);
        memory[i] = taken[i]->data;
    }
    buffer_drop(taken[0]);
    buffer_drop(taken[1]);
    expect(is_mapped(memory[0]) && is_mapped(memory[1]), "none is kept");
    buffers_rest(all);
    expect(!is_mapped(memory[0]) && !is_mapped(memory[1]), "what nobody has is kept");
    expect(is_mapped(memory[2]) && taken[2]->data[SIZE - 1] == 1, "what somebody has is gone");
    buffer_drop(taken[2]);
    taken[0] = buffer_take(all, 0);
    expect(taken[0]->data == memory[2], "none is kept any more");
    buffer_drop(taken[0]);
    buffers_free(all);
}

/* As many windows, each of which takes so long, by one and by two. How many were fetched by two. */
static unsigned judged(struct judge *j, unsigned windows, uint64_t alone_ns, uint64_t helped_ns)
{
    unsigned helped = 0;
    while (windows--) {
        bool helps = judge_next(j);
        helped += helps;
        judge_took(j, helps ? helped_ns : alone_ns, WINDOW * TM_PAGE);
    }
    return helped;
}

static void what_is_quicker(struct world *w)
{
    (void)w;
    enum { TRIAL = JUDGE_TURN * JUDGE_TURNS };
    struct judge j = {0};
    expect(judged(&j, TRIAL, 100000, 80000) == TRIAL / 2, "a trial of one kind only");
    expect(judged(&j, JUDGE_STAY, 100000, 80000) == JUDGE_STAY, "what is quicker was not done");
    expect(judged(&j, TRIAL, 100000, 98000) == TRIAL / 2, "no second trial");
    expect(judged(&j, JUDGE_STAY, 100000, 98000) == 0, "help that saves next to nothing");
    expect(judged(&j, TRIAL, 100000, 120000) == TRIAL / 2, "no third trial");
    expect(judged(&j, JUDGE_STAY, 100000, 120000) == 0, "help that harms");
    j = (struct judge){0};
    for (unsigned i = 0; i < TRIAL; i++) { /* its program pauses whenever it was helped */
        bool helps = judge_next(&j);
        if (helps)
            judge_took(&j, JUDGE_MOST_NS + 1, WINDOW * TM_PAGE);
        judge_took(&j, helps ? 80000 : 100000, WINDOW * TM_PAGE);
    }
    expect(judge_next(&j), "a program that pauses was held against it");
    j = (struct judge){0};
    for (unsigned i = 0; i < TRIAL; i++) { /* and it loses its CPU now and then */
        bool helps = judge_next(&j);
        judge_took(&j, helps && i % JUDGE_TURN < 3 ? JUDGE_MOST_NS : helps ? 80000 : 100000, WINDOW * TM_PAGE);
    }
    expect(judge_next(&j), "some long windows have decided");
}

static const struct {
    const char *name;
    void (*run)(struct world *w);
} scenarios[] = {
    {"fetched_by_one", fetched_by_one},
    {"fetched_by_two", fetched_by_two},
    {"ended_while_the_second_fetches", ended_while_the_second_fetches},
    {"nothing_is_fetched_that_is_not_lent", nothing_is_fetched_that_is_not_lent},
    {"a_page_is_missing", a_page_is_missing},
    {"beside_changes", beside_changes},
    {"huge_pages_are_asked_for", huge_pages_are_asked_for},
    {"small_windows_take_little", small_windows_take_little},
    {"memory_goes_back", memory_goes_back},
    {"memory_stays_while_the_second_fetches", memory_stays_while_the_second_fetches},
    {"buffers_go_back", buffers_go_back},
    {"what_is_quicker", what_is_quicker},
};

static void run(struct tm_segment *seg, unsigned n)
{
    struct world w = {.pool = {.seg = seg}, .version = 1};
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial;
    scenario = scenarios[n].name;
    oid_make(w.oid, n);
    client_open(ctx, "test", true, &id, &serial);
    if (pool_new(ctx, id, serial, &(struct pool_wish){.id = -1}, &w.pool.pool, &w.pool.serial) != TM_OK
        || hits_init(&w.hits, 1 << 20))
        exit(2);
    put_all(&w);
    w.gate = gate_new();
    say(&w, true);
    hits_use(&w.hits, &w.pool);
    files_add(&w.hits.files, FH, -1, w.gate, true);
    ahead_init(&w.ahead, &w.hits);
    scenarios[n].run(&w);
    ahead_free(&w.ahead);
    hits_free(&w.hits);
    gate_drop(w.gate);
    pool_destroy(ctx, w.pool.pool, w.pool.serial);
}

int main(int argc, char **argv)
{
    struct tm_segment *seg;
    if (argc != 2 || tm_create(argv[1], 16 << 20, &seg)) {
        fprintf(stderr, "usage: streams SEGMENT\n");
        return 2;
    }
    leads = true;
    for (unsigned n = 0; n < sizeof scenarios / sizeof *scenarios; n++)
        run(seg, n);
    tm_close(seg);
    unlink(argv[1]);
    if (!failures)
        printf("streams: %zu scenarios\n", sizeof scenarios / sizeof *scenarios);
    return failures != 0;
}
