/* What the native reader reads of a lower file and puts, against changes of that file: by interleavings. A thread answers
 * a READ and stops at a named point of `reader_hits.c`; meanwhile the file is changed as `fs/coherence.py` does it (close
 * the gate, flush, change, flush, open the gate). Whatever the order, the pool never has old bytes afterwards.
 *
 *     misses SEGMENT FILE      (FILE: on a file system that can read without waiting) */
#include "reader_hits.h"
#include "expect.h"
#include "witness.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PUTTING = 95, BEFORE_READ = 96, AFTER_READ = 97 }; /* the points */
enum { FH = 5, PAGES = 1024, AT = 300, NPAGES = 3 };

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
    int file, kernel; /* the lower file, and the other end of the device */
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

static bool read_pages(struct world *w, uint32_t first, uint32_t npages)
{
    static uint8_t data[NPAGES * TM_PAGE];
    struct fuse_in_header in = {.opcode = FUSE_READ, .unique = 1};
    struct fuse_read_in read_in = {.fh = FH, .offset = (uint64_t)first * TM_PAGE, .size = npages * TM_PAGE};
    return hits_answer(&w->hits, &in, &read_in, data, true);
}

static void *answer(void *arg)
{
    stops = true;
    return (void *)(uintptr_t)read_pages(arg, AT, NPAGES);
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
    uint8_t reply[sizeof(struct fuse_out_header) + NPAGES * TM_PAGE];
    void *answered;
    atomic_store(&go, 1);
    pthread_join(thread, &answered);
    expect(answered != NULL, "the READ was not answered");
    ssize_t n = recv(w->kernel, reply, sizeof reply, MSG_DONTWAIT);
    expect(n == sizeof reply, "a reply of %zd bytes", n);
    for (uint32_t i = 0; n == sizeof reply && i < NPAGES; i++)
        expect(page_is(reply + sizeof(struct fuse_out_header) + i * TM_PAGE, AT + i, version), "wrong bytes in the reply");
}

static void flush(struct world *w) { (void)tm_flush(&w->pool, w->oid, 0, gate_top(w->gate)); }

static int64_t stored(struct world *w, uint64_t version)
{
    uint8_t pages[NPAGES * TM_PAGE];
    int64_t n = tm_get(&w->pool, w->oid, AT, pages, NPAGES);
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
    expect(stored(w, w->version) == NPAGES, "it was not put");
    expect(gate_top(w->gate) == AT + NPAGES, "the gate does not know how far it was put");
    expect(atomic_load(&w->hits.miss_reads) == 1 && atomic_load(&w->hits.put_pages) == NPAGES, "counted wrongly");
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
    expect(atomic_load(&w->hits.overtaken_pages) == NPAGES, "counted wrongly");
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

/* A change waits for a put under way, and then flushes it. */
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

static void what_is_for_python(struct world *w)
{
    expect(read_pages(w, AT, NPAGES), "a miss far from the one before is answered");
    expect(!read_pages(w, AT + NPAGES, 1), "a miss near the one before");
    if (ftruncate(w->file, (off_t)PAGES * TM_PAGE - 100))
        exit(2);
    gate_set(w->gate, w->oid, (uint64_t)PAGES * TM_PAGE - 100, true, true);
    expect(!read_pages(w, PAGES - 1, 1), "a page that the file ends in");
    gate_set(w->gate, w->oid, (uint64_t)PAGES * TM_PAGE - 100, true, false);
    expect(!read_pages(w, 0, 1), "a file whose misses are not taken");
    say(w, false);
    expect(!read_pages(w, AT, 1), "a closed gate");
    say(w, true);
    files_mark(&w->hits.files, FH, TM_PAGE);
    files_mark(&w->hits.files, FH, UINT64_MAX);
    expect(!read_pages(w, 2 * AT, 1), "a file that was read ahead of");
}

static const struct {
    const char *name;
    void (*run)(struct world *w);
} scenarios[] = {
    {"undisturbed", undisturbed},
    {"read_before_a_change", read_before_a_change},
    {"begun_before_a_change", begun_before_a_change},
    {"put_while_a_change_begins", put_while_a_change_begins},
    {"read_before_a_foreign_change_is_found", read_before_a_foreign_change_is_found},
    {"another_object", another_object},
    {"the_pool_goes", the_pool_goes},
    {"what_is_for_python", what_is_for_python},
};

static void run(struct tm_segment *seg, const char *path, unsigned n)
{
    struct world w = {.pool = {.seg = seg}};
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial;
    int ends[2];
    scenario = scenarios[n].name;
    oid_make(w.oid, n);
    w.oid[TM_OID - 1] = 1;
    client_open(ctx, "test", true, &id, &serial);
    if (pool_new(ctx, id, serial, &(struct pool_wish){.id = -1}, &w.pool.pool, &w.pool.serial) != TM_OK
        || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) || hits_init(&w.hits, ends[0], 1 << 20))
        exit(2);
    w.kernel = ends[1];
    w.file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    write_file(&w);
    w.gate = gate_new();
    say(&w, true);
    hits_use(&w.hits, &w.pool);
    files_add(&w.hits.files, FH, w.file, w.gate);
    expect(!read_pages(&w, 0, 1), "the first miss of a file is for Python");
    scenarios[n].run(&w);
    hits_free(&w.hits);
    gate_drop(w.gate);
    close(w.file);
    close(ends[0]);
    close(ends[1]);
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
        run(seg, argv[2], n);
    tm_close(seg);
    unlink(argv[1]);
    if (!failures)
        printf("misses: %zu scenarios\n", sizeof scenarios / sizeof *scenarios);
    return failures != 0;
}
