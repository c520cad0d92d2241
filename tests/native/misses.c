/* What the native reader reads of a lower file and puts, against changes of that file: by interleavings. A thread answers
 * a READ, one that the kernel has cached, one that waits for the lower, or one that reads it past the cache, and stops at a named point of `reader_hits.c`; meanwhile the file is changed as `fs/coherence.py` does it (close
 * the gate, flush, change, flush, open the gate). Whatever the order, the pool never has old bytes afterwards.
 *
 *     misses SEGMENT FILE      (FILE: on a file system that can read without waiting, and past the cache) */
#include "reader_hits.h"
#include "expect.h"
#include "witness.h"

#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PUTTING = 95, BEFORE_READ = 96, AFTER_READ = 97 }; /* the points */
enum { FH = 5, PAGES = 1024, AT = 300, MANY = 40 }; /* MANY: more than are put at a time */
enum { AT_ONCE = 1, WAITING = 2, COLD = 4, HERE = 8, ANY_WAY = 15 };

static _Atomic uint32_t stop_at, reached, go;
static _Thread_local bool stops;

static void nap(void) { nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL); }

void kill_point(int n)
{
    if (!stops || atomic_load(&stop_at) != (uint32_t)n || atomic_load(&reached))
        return;
    atomic_store(&reached, 1);
    while (!atomic_load(&go))
        nap();
}

struct world {
    struct hits hits;
    struct gate *gate;
    struct tm_handle pool;
    int file;   /* the lower file, for who changes it */
    int lower;  /* for who reads it */
    bool waits; /* how READs are answered: by who may wait, and for more pages than others take */
    bool cold;  /* the same, for few pages that the kernel probably does not have */
    bool here;  /* the same, by who has looked whether it must be waited for, in one go */
    bool agrees; /* to wait */
    unsigned begun;
    uint8_t oid[TM_OID];
    uint64_t version; /* of all its pages */
};

static void write_file(struct world *w)
{
    uint8_t page[TM_PAGE];
    w->version++;
    for (uint32_t i = 0; i < PAGES; i++) {
        page_make(page, i, w->version);
        if (pwrite(w->file, page, TM_PAGE, (off_t)i * TM_PAGE) != TM_PAGE)
            exit(2);
    }
}

static void say(struct world *w, bool open) { gate_set(w->gate, w->oid, (uint64_t)PAGES * TM_PAGE, open, true); }

static _Alignas(TM_PAGE) uint8_t data[MANY * TM_PAGE];
static struct answer given;

static bool begin_waiting(void *arg)
{
    struct world *w = arg;
    w->begun += w->agrees;
    return w->agrees;
}

static enum found read_pages(struct world *w, uint32_t first, uint32_t npages, bool waits)
{
    struct fuse_read_in read_in = {.fh = FH, .offset = (uint64_t)first * TM_PAGE, .size = npages * TM_PAGE};
    struct wait wait = {.begin = begin_waiting, .with = w};
    enum found found = waits && w->here ? hits_find_or_wait(&w->hits, &read_in, data, &wait, &given)
                                        : hits_find(&w->hits, &read_in, data, waits, &given);
    if (found == FOUND)
        hits_put(&w->hits, &given);
    return found;
}

static uint32_t npages(const struct world *w) { return w->waits && !w->cold ? MANY : 3; }

static void *answer(void *arg)
{
    struct world *w = arg;
    stops = true;
    return (void *)(uintptr_t)(read_pages(w, AT, npages(w), w->waits) == FOUND);
}

static void begin(struct world *w, pthread_t *thread, uint32_t point)
{
    atomic_store(&stop_at, point);
    atomic_store(&reached, 0);
    atomic_store(&go, 0);
    if (pthread_create(thread, NULL, answer, w))
        exit(2);
    for (int i = 0; point && i < 25000 && !atomic_load(&reached); i++)
        nap();
    expect(!point || atomic_load(&reached), "never came to point %u", point);
}

/* The READ was answered with pages of `version`. */
static void finish(struct world *w, pthread_t thread, uint64_t version)
{
    void *answered;
    atomic_store(&go, 1);
    pthread_join(thread, &answered);
    expect(answered != NULL, "the READ was not answered");
    expect(given.length == npages(w) * TM_PAGE, "an answer of %zu bytes", given.length);
    for (uint32_t i = 0; answered && i < npages(w); i++)
        expect(page_is(given.bytes + i * TM_PAGE, AT + i, version), "wrong bytes in the answer");
}

static void flush(struct world *w) { (void)tm_flush(&w->pool, w->oid, 0, gate_top(w->gate)); }

static int64_t stored(struct world *w, uint64_t version)
{
    uint8_t pages[MANY * TM_PAGE];
    int64_t n = tm_get(&w->pool, w->oid, AT, pages, npages(w));
    for (uint32_t i = 0; i < (uint32_t)(n > 0 ? n : 0); i++)
        expect(page_is(pages + i * TM_PAGE, AT + i, version), "old bytes are in the pool");
    return n;
}

static void own_change(struct world *w)
{
    say(w, false);
    flush(w);
    write_file(w);
    flush(w);
    say(w, true);
}

static void undisturbed(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, 0);
    finish(w, thread, w->version);
    expect(stored(w, w->version) == npages(w), "it was not put");
    expect(gate_top(w->gate) == AT + npages(w), "the gate does not know how far it was put");
    expect(atomic_load(&w->hits.miss_reads) == 1 && atomic_load(&w->hits.put_pages) == npages(w), "counted wrongly");
    begin(w, &thread, 0);
    finish(w, thread, w->version);
    expect(atomic_load(&w->hits.reads) == 1, "the second one is no hit");
}

static void read_before_a_change(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, AFTER_READ);
    own_change(w);
    finish(w, thread, w->version - 1);
    expect(stored(w, w->version) == 0, "what was overtaken was put");
    expect(atomic_load(&w->hits.overtaken_pages) == npages(w), "counted wrongly");
}

static void begun_before_a_change(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, BEFORE_READ);
    own_change(w);
    finish(w, thread, w->version);
    expect(stored(w, w->version) == 0, "what was overtaken was put");
}

static void *change(void *arg)
{
    own_change(arg);
    atomic_store(&stop_at, UINT32_MAX);
    return NULL;
}

/* A change waits for a put under way, and then flushes it; if more is to be put, it comes between. */
static void put_while_a_change_begins(struct world *w)
{
    pthread_t thread, changing;
    begin(w, &thread, PUTTING);
    if (pthread_create(&changing, NULL, change, w))
        exit(2);
    for (int i = 0; i < 250; i++) /* it must not come by in this time, nor in any other */
        nap();
    expect(atomic_load(&stop_at) == PUTTING, "the change did not wait for the put");
    finish(w, thread, 1);
    pthread_join(changing, NULL);
    (void)stored(w, w->version);
}

static void read_before_a_foreign_change_is_found(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, AFTER_READ);
    write_file(w);
    gate_overtake(w->gate);
    flush(w);
    finish(w, thread, w->version - 1);
    expect(stored(w, w->version) == 0, "what was overtaken was put");
}

static void another_object(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, AFTER_READ);
    w->oid[0] ^= 1;
    say(w, true);
    finish(w, thread, w->version);
    expect(stored(w, w->version) == 0, "it was put to the new object");
}

static void the_pool_goes(struct world *w)
{
    pthread_t thread;
    begin(w, &thread, AFTER_READ);
    hits_use(&w->hits, NULL);
    finish(w, thread, w->version);
    expect(stored(w, w->version) == 0, "it was put to a pool that is not used any more");
}

/* The program was killed and its file closed, while the lower was read: the descriptor stays as long as it is used. */
static void closed_while_it_waits(struct world *w)
{
    pthread_t thread;
    int fd = w->lower;
    struct file *held = files_hold(&w->hits.files, FH);
    w->lower = -1;
    begin(w, &thread, BEFORE_READ);
    expect(files_remove(&w->hits.files, FH), "a descriptor that is used was left to who closes it");
    finish(w, thread, w->version);
    expect(fcntl(fd, F_GETFD) >= 0, "the descriptor was closed while it was used");
    files_release(&w->hits.files, held);
    expect(fcntl(fd, F_GETFD) < 0, "the descriptor was not closed");
}

static void what_is_for_whom(struct world *w)
{
    const uint64_t size = (uint64_t)PAGES * TM_PAGE;
    expect(read_pages(w, 0, 3, false) == FOUND, "the first miss of a file");
    expect(read_pages(w, AT, 3, false) == FOUND, "a miss far from the one before");
    expect(read_pages(w, AT - 3, 3, false) == FOUND, "a miss just before the one before");
    expect(read_pages(w, AT + 3, 1, false) == FOUND_NOT, "a miss where one ended: it may be a stream");
    expect(files_follows(&w->hits.files, FH, (uint64_t)(AT + 4) * TM_PAGE), "a miss for Python was not noted");
    expect(read_pages(w, AT + 8, MANY, false) == FOUND_IF_WAITING, "many pages take long");
    expect(read_pages(w, AT + 8, MANY, true) == FOUND, "many pages, by who may wait");
    if (ftruncate(w->file, (off_t)size - 100))
        exit(2);
    gate_set(w->gate, w->oid, size - 100, true, true);
    expect(read_pages(w, PAGES - 1, 1, w->waits) == FOUND, "a page that the file ends in");
    expect(given.length == TM_PAGE - 100, "%zu bytes of the last page", given.length);
    uint8_t last[TM_PAGE], none[100] = {0};
    expect(tm_get(&w->pool, w->oid, PAGES - 1, last, 1) == 1, "the last page was not put");
    expect(!memcmp(last + TM_PAGE - 100, none, 100), "the last page has no zeros after its end");
    gate_set(w->gate, w->oid, size - 200, true, true);
    expect(read_pages(w, PAGES - 2, 2, true) == FOUND_NOT, "the end of a file that is elsewhere now");
    gate_set(w->gate, w->oid, size - 100, true, false);
    expect(read_pages(w, 100, 1, false) == FOUND_NOT, "a file whose misses are not taken");
    say(w, false);
    expect(read_pages(w, AT, 1, true) == FOUND_NOT, "a closed gate");
    say(w, true);
}

/* Misses of a stream are for Python, wherever its reader is, and so is the READ that reaches the mark. What others read in the
 * file is not. */
static void a_stream(struct world *w)
{
    struct files *f = &w->hits.files;
    expect(files_position(f, FH) == NO_STREAM, "a stream that nobody began");
    files_stream(f, FH, AT * TM_PAGE);
    files_mark(f, FH, (AT + 16) * TM_PAGE, (AT + 32) * TM_PAGE);
    expect(read_pages(w, AT, 2, false) == FOUND_NOT, "the reader's miss");
    expect(files_position(f, FH) == (AT + 2) * TM_PAGE, "the reader has not moved");
    expect(read_pages(w, AT - 14, 2, false) == FOUND_NOT, "a late miss");
    expect(read_pages(w, AT + 48, 2, false) == FOUND_NOT, "an early miss beyond what is read ahead");
    expect(read_pages(w, AT - 24, 2, false) == FOUND, "a miss long before the reader");
    expect(read_pages(w, AT + 60, 2, false) == FOUND, "a miss far beyond");
    expect(read_pages(w, AT - 24, 2, false) == FOUND && read_pages(w, AT + 60, 2, false) == FOUND, "hits of others");
    expect(files_position(f, FH) == (AT + 2) * TM_PAGE, "others have moved the reader");
    for (uint32_t i = AT; i < AT + 32; i++) {
        uint8_t page[TM_PAGE];
        page_make(page, i, w->version);
        expect(tm_put(&w->pool, w->oid, i, page, 1, KEEP_NOTHING) == 1, "no room");
    }
    for (uint32_t i = AT; i < AT + 16; i += 2)
        expect(read_pages(w, i ^ 2, 2, false) == FOUND, "a hit of the reader, in some disorder");
    expect(read_pages(w, AT + 16, 2, false) == FOUND_NOT, "the mark is reached");
    expect(read_pages(w, AT + 16, 2, false) == FOUND, "once");
    files_stream(f, FH, NO_STREAM);
    expect(read_pages(w, AT + 34, 2, false) == FOUND, "the stream is over");
}

/* A lower that is elsewhere: where its file ends is not known at once. The access of a hit is noted in Python. */
static void not_at_once(struct world *w)
{
    files_remove(&w->hits.files, FH);
    files_add(&w->hits.files, FH, w->lower, w->gate, false);
    expect(read_pages(w, PAGES - 1, 2, false) == FOUND_IF_WAITING, "the end of a lower that may hang");
    expect(read_pages(w, PAGES - 1, 2, true) == FOUND && given.length == TM_PAGE, "its last page");
    files_note(&w->hits.files, FH);
    expect(read_pages(w, PAGES - 1, 1, false) == FOUND_NOT, "a hit whose access must be noted");
    expect(read_pages(w, PAGES - 1, 1, false) == FOUND, "once");
    files_note(&w->hits.files, FH);
    expect(read_pages(w, AT, 1, false) == FOUND, "a miss is noted by itself");
    expect(read_pages(w, AT, 1, false) == FOUND, "and is a hit from then on");
}

/* A page that the kernel does not have, in a row of such, is not begun to be read by who finds that out. */
static void a_page_that_is_not_there(struct world *w)
{
    uint64_t range[2] = {(uint64_t)AT * TM_PAGE, TM_PAGE}, is[5]; /* cachestat: there, or coming */
    if (fsync(w->file) || posix_fadvise(w->file, 0, 0, POSIX_FADV_DONTNEED))
        exit(2);
    files_had(&w->hits.files, FH, true, false);
    bool told = !syscall(451, w->file, range, is, 0) && !is[0]; /* the kernel may keep some */
    expect(read_pages(w, AT, 1, false) == FOUND_IF_WAITING, "the kernel has it");
    expect(!told || (!syscall(451, w->file, range, is, 0) && !is[0]), "it is being read");
    expect(read_pages(w, AT, 1, true) == FOUND && page_is(data, AT, w->version), "wrong bytes");
}

/* After some that were not there another descriptor is opened, for one that is known not to be. */
static void not_there_once_more(struct world *w)
{
    uint64_t range[2] = {(uint64_t)AT * TM_PAGE, 100 * TM_PAGE}, is[5];
    struct files *f = &w->hits.files;
    if (fsync(w->file) || posix_fadvise(w->file, 0, 0, POSIX_FADV_DONTNEED))
        exit(2);
    files_remove(f, FH); /* nothing is known of it */
    files_add(f, FH, w->lower, w->gate, true);
    if (syscall(451, w->file, range, is, 0) || is[0])
        return; /* the kernel does not tell, or keeps some */
    for (uint32_t i = 0; i < 4; i++) {
        expect(!f->npast, "opened for %u", i);
        expect(read_pages(w, AT + 10 * i, 1, true) == FOUND && page_is(data, AT + 10 * i, w->version), "wrong bytes");
    }
    expect(f->npast == 1, "it was not read past the cache");
}

/* Whether the kernel has a page is not asked each time if it did not have the last ones. */
static void a_cold_file(struct world *w)
{
    for (int i = 0; i < 9; i++)
        files_had(&w->hits.files, FH, false, false);
    expect(read_pages(w, AT, 1, false) == FOUND_IF_WAITING, "it was asked");
    expect(read_pages(w, AT, 1, true) == FOUND, "who waits asks nobody");
    for (int i = 0; i < 118; i++)
        files_had(&w->hits.files, FH, false, false);
    expect(read_pages(w, AT + 10, 1, false) == FOUND, "it was never asked again");
    expect(read_pages(w, AT + 20, 1, false) == FOUND, "the kernel has them again");
}

static unsigned cached(const struct world *w)
{
    unsigned n = 0;
    unsigned char present[PAGES] = {0};
    void *at = mmap(NULL, PAGES * TM_PAGE, PROT_READ, MAP_SHARED, w->file, 0);
    if (at == MAP_FAILED || mincore(at, PAGES * TM_PAGE, present))
        exit(2);
    munmap(at, PAGES * TM_PAGE);
    for (unsigned i = 0; i < PAGES; i++)
        n += present[i] & 1;
    return n;
}

/* Another descriptor is opened then, which reads past the cache what programs have just written into it, and leaves nothing there. */
static void past_the_cache(struct world *w)
{
    struct files *f = &w->hits.files;
    struct statx st;
    if (statx(w->lower, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) || !st.stx_dio_offset_align)
        exit(2); /* give this test another file system */
    expect(read_pages(w, AT, 3, true) == FOUND && page_is(data, AT, 1), "pages that are dirty");
    write_file(w);
    expect(read_pages(w, AT + 10, 3, true) == FOUND && page_is(data, AT + 10, 2), "and dirty again");
    if (fsync(w->file) || posix_fadvise(w->file, 0, 0, POSIX_FADV_DONTNEED))
        exit(2);
    unsigned before = cached(w); /* the kernel may keep some */
    expect(read_pages(w, AT + 20, 3, true) == FOUND && page_is(data, AT + 20, 2), "pages that are on the disk alone");
    expect(cached(w) <= before, "they stayed in the cache");
    int past = files_past_cache(f, FH), empty = open("/dev/null", O_RDONLY);
    expect(past >= 0 && past == files_past_cache(f, FH), "it is not opened once");
    if (dup2(empty, past) != past)
        exit(2);
    expect(read_pages(w, AT + 30, 3, true) == FOUND && page_is(data, AT + 30, 2), "it reads too little, the other one reads");
    files_remove(f, FH);
    expect(fcntl(past, F_GETFD) < 0, "it was not closed");
    files_add(f, FH, w->file, w->gate, true);
    expect(files_past_cache(f, FH) < 0, "it is opened beside one that writes");
    close(empty);
}

static bool holds(struct world *w, uint64_t turn)
{
    struct fuse_read_in read_in = {.fh = FH, .offset = AT * TM_PAGE, .size = npages(w) * TM_PAGE};
    return hits_hold(&w->hits, &read_in, turn);
}

static bool fetched(struct world *w, uint32_t first, uint32_t count, struct target *t)
{
    return hits_expect(&w->hits, FH, (uint64_t)first * TM_PAGE, count * TM_PAGE, t) && hits_fetch(&w->hits, t, first, data, count);
}

/* They are a small part of what the process may have open: the rest is for files. */
static void few_past_the_cache(struct world *w)
{
    enum { FILES = 20, FEW = 4 };
    struct files few;
    struct rlimit before, low;
    unsigned opened = 0;
    getrlimit(RLIMIT_NOFILE, &before);
    low = (struct rlimit){64, before.rlim_max};
    setrlimit(RLIMIT_NOFILE, &low);
    expect(!files_init(&few), "not made");
    for (uint64_t fh = 0; fh < FILES; fh++) {
        files_add(&few, fh, w->lower, w->gate, true);
        opened += files_past_cache(&few, fh) >= 0;
    }
    expect(opened == FEW, "%u of %d files have one", opened, FILES);
    files_remove(&few, 0);
    expect(files_past_cache(&few, FILES - 1) >= 0, "none, though another one was closed");
    files_free(&few);
    setrlimit(RLIMIT_NOFILE, &before);
}

/* What was fetched before it was asked for answers nobody after a change, nor where Python wants to see the READ. */
static void fetched_before_it_is_asked_for(struct world *w)
{
    struct target t, later;
    expect(!fetched(w, AT, npages(w), &t), "a part of the pages");
    expect(read_pages(w, AT, npages(w), w->waits) == FOUND, "a miss");
    expect(fetched(w, AT, npages(w), &t), "all pages are there");
    expect(page_is(data, AT, w->version), "wrong bytes were fetched");
    expect(holds(w, t.turn), "nothing has changed");
    files_stream(&w->hits.files, FH, AT * TM_PAGE);
    files_mark(&w->hits.files, FH, AT * TM_PAGE, (AT + 40) * TM_PAGE);
    expect(!holds(w, t.turn), "a READ that reaches a mark is for Python");
    expect(read_pages(w, AT, npages(w), w->waits) == FOUND_NOT, "the mark was taken away");
    expect(holds(w, t.turn), "the mark is still there");
    files_mark(&w->hits.files, FH, AT * TM_PAGE, (AT + 40) * TM_PAGE);
    expect(!fetched(w, AT, npages(w), &later), "beyond a mark");
    files_stream(&w->hits.files, FH, NO_STREAM);
    expect(fetched(w, AT, npages(w), &t), "all pages are there again");
    own_change(w);
    expect(!holds(w, t.turn), "old bytes after a change");
    expect(!fetched(w, PAGES - 1, 2, &later), "beyond the end");
}

/* Who would wait here is asked first: the READ must be known to be under way by then. */
static void asked_before_it_waits(struct world *w)
{
    w->agrees = false;
    expect(read_pages(w, AT, 3, true) == FOUND_IF_WAITING, "it waited though it may not");
    expect(tm_get(&w->pool, w->oid, AT, data, 1) == 0, "it was put");
    w->agrees = true;
    expect(read_pages(w, AT, 3, true) == FOUND && w->begun == 1, "it was asked %u times", w->begun);
    expect(read_pages(w, AT, 3, true) == FOUND && w->begun == 1, "a hit is not waited for");
    files_remove(&w->hits.files, FH);
    files_add(&w->hits.files, FH, w->lower, w->gate, false);
    expect(read_pages(w, PAGES - 1, 2, true) == FOUND && w->begun == 2, "the end of a lower that may hang");
    w->agrees = false;
    expect(read_pages(w, PAGES - 1, 2, true) == FOUND_IF_WAITING, "the same, though it may not");
}

/* A change flushes up to `gate_top`, which is what 32 bits can say. */
static void the_last_page(struct world *w)
{
    const uint64_t size = (UINT64_C(1) << 32) * TM_PAGE;
    int large = memfd_create("large", MFD_CLOEXEC);
    if (large < 0 || ftruncate(large, (off_t)size))
        exit(2);
    files_remove(&w->hits.files, FH);
    files_add(&w->hits.files, FH, large, w->gate, true);
    gate_set(w->gate, w->oid, size, true, true);
    expect(read_pages(w, UINT32_MAX - 1, 1, true) == FOUND, "the last page but one");
    expect(gate_top(w->gate) == UINT32_MAX, "it was put up to page %u", gate_top(w->gate));
    expect(read_pages(w, UINT32_MAX, 1, true) == FOUND_NOT, "the last page that can be named");
    expect(read_pages(w, UINT32_MAX - 1, 2, true) == FOUND_NOT, "both");
    close(large);
}

static const struct {
    const char *name;
    void (*run)(struct world *w);
    unsigned ways; /* AT_ONCE and so on */
} scenarios[] = {
    {"undisturbed", undisturbed, ANY_WAY},
    {"a_stream", a_stream, AT_ONCE | WAITING},
    {"read_before_a_change", read_before_a_change, ANY_WAY},
    {"begun_before_a_change", begun_before_a_change, ANY_WAY},
    {"put_while_a_change_begins", put_while_a_change_begins, ANY_WAY},
    {"read_before_a_foreign_change_is_found", read_before_a_foreign_change_is_found, ANY_WAY},
    {"another_object", another_object, ANY_WAY},
    {"the_pool_goes", the_pool_goes, ANY_WAY},
    {"closed_while_it_waits", closed_while_it_waits, ANY_WAY},
    {"what_is_for_whom", what_is_for_whom, AT_ONCE | WAITING},
    {"not_at_once", not_at_once, AT_ONCE | WAITING},
    {"a_cold_file", a_cold_file, AT_ONCE | WAITING},
    {"a_page_that_is_not_there", a_page_that_is_not_there, AT_ONCE | WAITING},
    {"not_there_once_more", not_there_once_more, HERE},
    {"past_the_cache", past_the_cache, COLD | HERE},
    {"asked_before_it_waits", asked_before_it_waits, HERE},
    {"few_past_the_cache", few_past_the_cache, COLD},
    {"the_last_page", the_last_page, WAITING},
    {"fetched_before_it_is_asked_for", fetched_before_it_is_asked_for, AT_ONCE | WAITING},
};

static void run(struct tm_segment *seg, const char *path, unsigned n, unsigned way)
{
    struct world w = {.pool = {.seg = seg}, .waits = way != AT_ONCE, .cold = way >= COLD, .here = way == HERE,
                      .agrees = true};
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial;
    scenario = scenarios[n].name;
    oid_make(w.oid, n);
    w.oid[TM_OID - 1] = (uint8_t)way;
    client_open(ctx, "test", true, &id, &serial);
    if (pool_new(ctx, id, serial, &(struct pool_wish){.id = -1}, &w.pool.pool, &w.pool.serial) != TM_OK
        || hits_init(&w.hits, 1 << 20))
        exit(2);
    w.file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    write_file(&w);
    w.gate = gate_new();
    say(&w, true);
    hits_use(&w.hits, &w.pool);
    w.lower = open(path, O_RDONLY);
    files_add(&w.hits.files, FH, w.lower, w.gate, true);
    for (int i = 0; w.cold && i < 10; i++)
        files_had(&w.hits.files, FH, false, false);
    scenarios[n].run(&w);
    hits_free(&w.hits);
    gate_drop(w.gate);
    close(w.file);
    if (w.lower >= 0)
        close(w.lower);
    pool_destroy(ctx, w.pool.pool, w.pool.serial);
}

int main(int argc, char **argv)
{
    struct tm_segment *seg;
    if (argc != 3 || tm_create(argv[1], 16 << 20, &seg)) {
        fprintf(stderr, "usage: misses SEGMENT FILE\n");
        return 2;
    }
    for (unsigned n = 0; n < sizeof scenarios / sizeof *scenarios; n++)
        for (unsigned way = AT_ONCE; way <= HERE; way <<= 1)
            if (scenarios[n].ways & way)
                run(seg, argv[2], n, way);
    tm_close(seg);
    unlink(argv[1]);
    if (!failures)
        printf("misses: %zu scenarios\n", sizeof scenarios / sizeof *scenarios);
    return failures != 0;
}
