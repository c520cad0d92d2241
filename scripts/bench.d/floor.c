/* Serves a directory of a few files as fast as a FUSE daemon in userspace can: READs are answered and nothing else is done.
 *
 *   floor [-p] [-m] [-a] [-r] LOWER POINT
 *
 * How far any daemon could go, beside what is measured: no pool, no checks, no threads. A READ brings the same bytes whatever
 * it asks for, or with -p what the lower file has there, which is the least that a miss takes, or with -m the file's own bytes
 * out of memory that holds all of it, which is the least that a hit takes: they are in no cache of the CPU. A request takes two system
 * calls: a read that waits, and the reply. With -a (awake) it does not wait but looks again, up to LOOKS times, yields in
 * between, and replies to up to TOGETHER requests one right after the other. -r: requests come over io_uring (backends/native/reader_rings.c, linked
 * here), and one takes one call or less.
 *
 * The files are those in LOWER that somebody asks for, up to MOST_FILES, as they are then. Root mounts. It ends when POINT is
 * unmounted.
 */
#include "reader_rings.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MOST_BYTES = 1 << 20, MOST_FILES = 8, ROOM = MOST_BYTES + 8192, BELIEVED_S = 3600, TOGETHER = 4, LOOKS = 1000 };

#define OVER_IO_URING (UINT64_C(1) << 41) /* FUSE_OVER_IO_URING of linux/fuse.h 7.42 */

/* What a request is answered with. */
struct reply {
    int error;         /* negative errno */
    const void *bytes; /* anywhere */
    size_t length;
};

static struct {
    int device, lower;
    bool reads_lower, from_memory, awake;
    unsigned nheld;
    struct held {
        uint64_t unique;
        struct reply reply;
    } held[TOGETHER];
    struct rings *rings;
    uint8_t *request, *bytes; /* ROOM of each */
    unsigned nfiles;
    struct {
        char name[256];
        int fd;
        struct stat status;
        const uint8_t *content; /* with -m */
    } files[MOST_FILES]; /* node FUSE_ROOT_ID + 1 is the first */
} at;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* ---- Names and attributes, which are asked for once -------------------------------------------------------- */

static struct fuse_attr attributes(uint64_t node)
{
    struct stat s;
    if (node == FUSE_ROOT_ID)
        fstat(at.lower, &s);
    else
        s = at.files[node - FUSE_ROOT_ID - 1].status;
    return (struct fuse_attr){.ino = s.st_ino, .size = (uint64_t)s.st_size, .blocks = (uint64_t)s.st_blocks,
                              .mode = s.st_mode, .nlink = (uint32_t)s.st_nlink, .blksize = 4096};
}

/* All of a file, in memory. */
static const uint8_t *content_of(int fd, size_t size)
{
    uint8_t *content = mmap(NULL, size + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (content == MAP_FAILED)
        die("memory");
    for (size_t done = 0; done < size;) {
        ssize_t n = pread(fd, content + done, size - done, (off_t)done);
        if (n <= 0)
            die("lower");
        done += (size_t)n;
    }
    return content;
}

/* The node of a name, 0: there is none. */
static uint64_t look_up(const char *name)
{
    for (unsigned i = 0; i < at.nfiles; i++)
        if (!strcmp(at.files[i].name, name))
            return FUSE_ROOT_ID + 1 + i;
    int fd = openat(at.lower, name, O_RDONLY);
    if (fd < 0 || at.nfiles == MOST_FILES || strlen(name) >= sizeof at.files[0].name)
        return 0;
    strcpy(at.files[at.nfiles].name, name);
    at.files[at.nfiles].fd = fd;
    fstat(fd, &at.files[at.nfiles].status);
    if (at.from_memory)
        at.files[at.nfiles].content = content_of(fd, (size_t)at.files[at.nfiles].status.st_size);
    return FUSE_ROOT_ID + 1 + at.nfiles++;
}

static bool knows(uint64_t node) { return node >= FUSE_ROOT_ID && node <= FUSE_ROOT_ID + at.nfiles; }

/* ---- Requests ---------------------------------------------------------------------------------------------- */

/* `room`: where the bytes of a READ may be put. */
static struct reply answer(const struct fuse_in_header *in, const void *argument, const void *name, uint8_t *room)
{
    static union {
        struct fuse_entry_out entry;
        struct fuse_attr_out attr;
        struct fuse_open_out open;
    } out;
    if (in->opcode == FUSE_READ && in->nodeid > FUSE_ROOT_ID && knows(in->nodeid)) {
        const struct fuse_read_in *wanted = argument;
        uint64_t size = (uint64_t)at.files[in->nodeid - FUSE_ROOT_ID - 1].status.st_size;
        size_t left = wanted->offset < size ? size - wanted->offset : 0, length = wanted->size < left ? wanted->size : left;
        if (at.from_memory)
            return (struct reply){0, at.files[in->nodeid - FUSE_ROOT_ID - 1].content + wanted->offset, length};
        if (!at.reads_lower)
            return (struct reply){0, at.bytes, length};
        ssize_t n = pread(at.files[in->nodeid - FUSE_ROOT_ID - 1].fd, room, length, (off_t)wanted->offset);
        return n < 0 ? (struct reply){-errno, NULL, 0} : (struct reply){0, room, (size_t)n};
    }
    memset(&out, 0, sizeof out);
    switch (in->opcode) {
    case FUSE_LOOKUP:
        if (in->nodeid != FUSE_ROOT_ID || !(out.entry.nodeid = look_up(name)))
            return (struct reply){-ENOENT, NULL, 0};
        out.entry.attr_valid = out.entry.entry_valid = BELIEVED_S;
        out.entry.attr = attributes(out.entry.nodeid);
        return (struct reply){0, &out, sizeof out.entry};
    case FUSE_GETATTR:
        if (!knows(in->nodeid))
            return (struct reply){-ENOENT, NULL, 0};
        out.attr.attr_valid = BELIEVED_S;
        out.attr.attr = attributes(in->nodeid);
        return (struct reply){0, &out, sizeof out.attr};
    case FUSE_OPEN:
        out.open.open_flags = FOPEN_DIRECT_IO;
        return (struct reply){0, &out, sizeof out.open};
    case FUSE_RELEASE:
    case FUSE_FLUSH:
        return (struct reply){0, NULL, 0};
    default:
        return (struct reply){-ENOSYS, NULL, 0};
    }
}

static void send_reply(uint64_t unique, struct reply r)
{
    struct fuse_out_header head = {.len = (uint32_t)(sizeof head + r.length), .error = r.error, .unique = unique};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)r.bytes, r.length}};
    if (writev(at.device, parts, r.length ? 2 : 1) < 0 && errno != ENOENT)
        die("reply");
}

static bool serve_entry(void *unused, unsigned ring, struct entry *e)
{
    (void)unused, (void)ring;
    const struct fuse_in_header *in = entry_request(e);
    /* A name comes in the payload. */
    struct reply r = answer(in, entry_argument(e), entry_payload(e, 0), entry_payload(e, MOST_BYTES));
    entry_fill(e, r.error, r.bytes, r.length);
    return true;
}

/* Whether there was a request; what it is answered with is sent later if that is a constant, up to TOGETHER of them. False and
 * errno: EAGAIN, or ENODEV when the connection is over. */
static bool serve_one(void)
{
    ssize_t n;
    while ((n = read(at.device, at.request, ROOM)) < 0 && (errno == EINTR || errno == ENOENT))
        ;
    if (n < 0)
        return false;
    const struct fuse_in_header *in = (const void *)at.request;
    if (in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET || in->opcode == FUSE_INTERRUPT)
        return true;
    struct reply r = answer(in, in + 1, in + 1, at.bytes);
    if (at.awake && in->opcode == FUSE_READ && !r.error && !at.reads_lower)
        at.held[at.nheld++] = (struct held){in->unique, r};
    else
        send_reply(in->unique, r);
    return true;
}

static void send_held(void)
{
    for (unsigned i = 0; i < at.nheld; i++)
        send_reply(at.held[i].unique, at.held[i].reply);
    at.nheld = 0;
}

static void serve(void)
{
    for (unsigned vain = 0;;) {
        bool more = serve_one();
        if (!more && errno != EAGAIN)
            break;
        if (more || at.nheld)
            vain = 0;
        else if (++vain < LOOKS)
            sched_yield();
        else /* nobody measures it */
            (void)poll(&(struct pollfd){.fd = at.device, .events = POLLIN}, 1, -1);
        if (!more || at.nheld == TOGETHER)
            send_held();
    }
    if (errno != ENODEV)
        die("request");
}

/* ---- Beginning --------------------------------------------------------------------------------------------- */

static void agree(bool over_rings)
{
    ssize_t n = read(at.device, at.request, ROOM);
    const struct fuse_in_header *in = (const void *)at.request;
    const struct fuse_init_in *offer = (const void *)(in + 1);
    if (n < (ssize_t)(sizeof *in + sizeof *offer) || in->opcode != FUSE_INIT)
        die("INIT");
    if (over_rings && !(offer->flags2 & (OVER_IO_URING >> 32))) {
        errno = ENOSYS;
        die("io_uring");
    }
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = MOST_BYTES,
        .flags = FUSE_ASYNC_READ | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS | FUSE_INIT_EXT,
        .flags2 = over_rings ? (uint32_t)(OVER_IO_URING >> 32) : 0,
        .max_background = 64,
        .congestion_threshold = 48,
        .max_write = MOST_BYTES,
        .time_gran = 1,
        .max_pages = MOST_BYTES / 4096,
    };
    if (over_rings && !(at.rings = rings_new(MOST_BYTES)))
        die("io_uring");
    send_reply(in->unique, (struct reply){0, &out, sizeof out});
    if (over_rings && rings_start(at.rings, at.device, serve_entry, NULL))
        die("io_uring");
}

uint64_t timing_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

int reader_thread(pthread_t *thread, void *(*run)(void *), void *arg) { return pthread_create(thread, NULL, run, arg); }

int main(int argc, char **argv)
{
    bool over_rings = false;
    char options[128];
    int option;
    while ((option = getopt(argc, argv, "pmar")) != -1)
        switch (option) {
        case 'p': at.reads_lower = true; break;
        case 'm': at.from_memory = true; break;
        case 'a': at.awake = true; break;
        case 'r': over_rings = true; break;
        default: return 2;
        }
    if (argc - optind != 2)
        return 2;
    at.request = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    at.bytes = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    at.lower = open(argv[optind], O_RDONLY | O_DIRECTORY);
    at.device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (at.request == MAP_FAILED || at.bytes == MAP_FAILED || at.lower < 0 || at.device < 0)
        die(argv[optind]);
    memset(at.bytes, 1, ROOM); /* or it would be the page of zeros, which is in every cache */
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", at.device);
    if (mount("floor", argv[optind + 1], "fuse", MS_NOSUID | MS_NODEV, options))
        die(argv[optind + 1]);
    agree(over_rings);
    if (at.awake && fcntl(at.device, F_SETFL, O_NONBLOCK))
        die("/dev/fuse");
    serve();
    rings_free(at.rings);
    return 0;
}
