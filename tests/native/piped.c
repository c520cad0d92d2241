/* Replies by way of a pipe (reader_piped.h), to a program that reads from a mount of the test's own; root mounts.
 *
 *     piped DIRECTORY
 *
 * The program is another process, as whoever is ended amid a read of its own mount waits for itself. The mount is in a namespace
 * of the test's, so it ends with it, however that ends. */
#include "reader_piped.h"
#include "expect.h"
#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

void kill_point(int n) { (void)n; }

enum { MOST = 1 << 20, SIZE = 3 * MOST + 777, NODE = 2, ROOM = MOST + 2 * TM_PAGE };

struct wish {
    size_t offset, size;
};

static struct {
    int device;
    const char *point;
    int wishes, results; /* to and from the program */
    pid_t program;
    uint8_t *got; /* what it has read, shared with it */
    uint8_t *content;
    uint8_t *window; /* what replies are sent from */
    struct piped piped;
    pthread_mutex_t lock; /* of the two below, and of `piped` */
    uint64_t due, by_pipe, by_writev; /* READs that a pipe has room for; those that were answered by one, and without */
    pthread_t thread;
} world;

static void send_plainly(uint64_t unique, int error, const void *bytes, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .error = error, .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)bytes, length}};
    (void)!writev(world.device, parts, length ? 2 : 1);
}

static struct fuse_attr attributes(uint64_t node)
{
    bool is_file = node == NODE;
    return (struct fuse_attr){.ino = node, .size = is_file ? SIZE : 0, .mode = is_file ? S_IFREG | 0444 : S_IFDIR | 0755,
                              .nlink = 1, .blksize = TM_PAGE};
}

/* As a reader does: fetched into memory that is used again at once. */
static void reply_to_read(const struct fuse_in_header *in, const struct fuse_read_in *wanted)
{
    size_t left = wanted->offset < SIZE ? SIZE - wanted->offset : 0, length = wanted->size < left ? wanted->size : left;
    uint8_t *bytes = world.window + wanted->offset % TM_PAGE;
    memcpy(bytes, world.content + wanted->offset, length);
    pthread_mutex_lock(&world.lock);
    bool sent = piped_reply(&world.piped, in->unique, bytes, length);
    size_t pages = (wanted->offset % TM_PAGE + length + TM_PAGE - 1) / TM_PAGE;
    world.due += length >= PIPED_LEAST && pages < world.piped.places;
    world.by_pipe += sent;
    if (!sent) {
        world.by_writev++;
        send_plainly(in->unique, 0, bytes, length);
    }
    pthread_mutex_unlock(&world.lock);
    memset(bytes, 0xa5, length);
}

static void reply_to(const struct fuse_in_header *in)
{
    union {
        struct fuse_init_out init;
        struct fuse_entry_out entry;
        struct fuse_attr_out attr;
        struct fuse_open_out open;
    } out = {0};
    switch (in->opcode) {
    case FUSE_INIT:
        out.init = (struct fuse_init_out){.major = FUSE_KERNEL_VERSION, .minor = 31, .max_readahead = MOST, .max_write = MOST,
                                          .flags = FUSE_MAX_PAGES, .max_pages = MOST / TM_PAGE, .max_background = 16,
                                          .congestion_threshold = 12, .time_gran = 1};
        send_plainly(in->unique, 0, &out, sizeof out.init);
        break;
    case FUSE_LOOKUP:
        out.entry = (struct fuse_entry_out){.nodeid = NODE, .attr_valid = 3600, .entry_valid = 3600, .attr = attributes(NODE)};
        send_plainly(in->unique, 0, &out, sizeof out.entry);
        break;
    case FUSE_GETATTR:
        out.attr = (struct fuse_attr_out){.attr_valid = 3600, .attr = attributes(in->nodeid)};
        send_plainly(in->unique, 0, &out, sizeof out.attr);
        break;
    case FUSE_OPEN:
        out.open.open_flags = FOPEN_DIRECT_IO;
        send_plainly(in->unique, 0, &out, sizeof out.open);
        break;
    case FUSE_READ:
        reply_to_read(in, (const void *)(in + 1));
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break;
    case FUSE_FLUSH:
    case FUSE_RELEASE:
        send_plainly(in->unique, 0, NULL, 0);
        break;
    default:
        send_plainly(in->unique, -ENOSYS, NULL, 0);
    }
}

static void *serve(void *unused)
{
    static _Alignas(8) uint8_t request[ROOM];
    for (;;) {
        ssize_t n = read(world.device, request, sizeof request);
        if (n > 0)
            reply_to((const void *)request);
        else if (errno == ENODEV)
            return unused;
    }
}

/* Who sends a reply counts it after that. */
static uint64_t sent_so_far(void)
{
    pthread_mutex_lock(&world.lock);
    uint64_t sent = world.by_pipe;
    pthread_mutex_unlock(&world.lock);
    return sent;
}

static int open_file(void)
{
    char name[4096];
    snprintf(name, sizeof name, "%s/file", world.point);
    return open(name, O_RDONLY | O_CLOEXEC);
}

/* The program: it has nothing of the server's, and ends with it. */
static void read_what_is_wished(int wishes, int results)
{
    struct wish wish;
    close(world.device);
    int file = open_file();
    while (read(wishes, &wish, sizeof wish) == sizeof wish) {
        ssize_t n = pread(file, world.got, wish.size, (off_t)wish.offset);
        if (write(results, &n, sizeof n) != sizeof n)
            break;
    }
    _exit(0);
}

static void start_program(void)
{
    int there[2], back[2];
    if (pipe2(there, O_CLOEXEC) || pipe2(back, O_CLOEXEC) || (world.program = fork()) < 0)
        exit(2);
    if (!world.program) {
        close(there[1]);
        close(back[0]);
        read_what_is_wished(there[0], back[1]);
    }
    close(there[0]);
    close(back[1]);
    world.wishes = there[1];
    world.results = back[0];
}

/* Have the program read; whether it gets what the file has there. */
static bool reads_right(size_t offset, size_t size)
{
    struct wish wish = {offset, size};
    size_t there = SIZE - offset < size ? SIZE - offset : size;
    ssize_t n = -1;
    memset(world.got, 0, there);
    if (write(world.wishes, &wish, sizeof wish) != sizeof wish || read(world.results, &n, sizeof n) != sizeof n)
        return false;
    return n == (ssize_t)there && !memcmp(world.got, world.content + offset, there);
}

static void read_some(unsigned times, size_t least)
{
    for (unsigned i = 0; i < times; i++) {
        size_t offset = (size_t)random() % SIZE, size = least + (size_t)random() % (MOST - least + 1);
        offset -= i % 2 ? 0 : offset % TM_PAGE;
        expect(reads_right(offset, size), "wrong bytes");
    }
}

static void use(int device, size_t largest)
{
    pthread_mutex_lock(&world.lock);
    piped_free(&world.piped);
    world.piped = (struct piped){0};
    piped_init(&world.piped, device, largest);
    world.due = world.by_pipe = world.by_writev = 0;
    pthread_mutex_unlock(&world.lock);
}

static void right_bytes(void)
{
    read_some(300, 1);
    uint64_t sent = sent_so_far();
    expect(world.due > 100, "nothing could go by a pipe");
    expect(sent == world.due, "%llu of %llu went by a pipe", (unsigned long long)sent, (unsigned long long)world.due);
    expect(!world.piped.failures, "a pipe has failed");
}

static void what_has_no_room(void)
{
    use(world.device, 256 << 10); /* its pipe has 512 KiB */
    read_some(100, 1);
    uint64_t sent = sent_so_far();
    expect(world.piped.places == 128 && world.by_writev > 20, "there was room for all");
    expect(sent == world.due && sent, "what had room did not go by it");
}

static void nobody_waits(void)
{
    pthread_mutex_lock(&world.lock);
    expect(piped_reply(&world.piped, 1 << 30, world.window, 256 << 10), "it is to be sent again");
    expect(!world.piped.failures, "it counts as a failure");
    pthread_mutex_unlock(&world.lock);
    read_some(20, 1);
}

/* A call that fails half way: what is in the pipe is nobody's answer. */
static void failures_between(void)
{
    int no_fuse = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    for (unsigned i = 0; i < 40; i++) {
        pthread_mutex_lock(&world.lock);
        world.piped.device = no_fuse;
        expect(!piped_reply(&world.piped, 1 << 30, world.window, 200 << 10), "it was sent to nobody");
        world.piped.device = world.device;
        pthread_mutex_unlock(&world.lock);
        expect(reads_right((size_t)i * TM_PAGE, 256 << 10), "wrong bytes after a failure");
    }
    expect(sent_so_far() == 40 && !world.by_writev, "a failure between others has ended it");
    world.piped.device = no_fuse;
    for (unsigned i = 0; i < 2 * PIPED_FAILURES; i++)
        expect(!piped_reply(&world.piped, 1 << 30, world.window, 256 << 10), "it was sent to nobody");
    expect(world.piped.failures == PIPED_FAILURES && world.piped.ends[0] < 0 && world.piped.ends[1] < 0, "it is tried for ever");
    world.piped.device = world.device;
    read_some(20, PIPED_LEAST);
    expect(sent_so_far() == 40, "it was tried again");
    close(no_fuse);
}

/* For a while there is no descriptor for a pipe, which says nothing about later. */
static void descriptors_run_out(void)
{
    struct rlimit before, none;
    getrlimit(RLIMIT_NOFILE, &before);
    none = (struct rlimit){0, before.rlim_max};
    pthread_mutex_lock(&world.lock);
    setrlimit(RLIMIT_NOFILE, &none);
    for (unsigned i = 0; i < 2 * PIPED_FAILURES; i++)
        expect(!piped_reply(&world.piped, 1 << 30, world.window, 256 << 10), "there was a pipe");
    setrlimit(RLIMIT_NOFILE, &before);
    pthread_mutex_unlock(&world.lock);
    read_some(20, PIPED_LEAST);
    uint64_t sent = sent_so_far();
    expect(sent && sent == world.due, "there is no pipe any more");
}

static void not_by_a_socket(void)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        exit(2);
    struct piped p = {0};
    piped_init(&p, ends[0], MOST);
    expect(!piped_reply(&p, 3, world.window, 256 << 10), "it was sent in pieces");
    piped_free(&p);
    close(ends[0]);
    close(ends[1]);
}

static void programs_that_are_killed(void)
{
    for (unsigned i = 0; i < 30; i++) {
        pid_t child = fork();
        if (!child) {
            static uint8_t got[MOST];
            close(world.device);
            int file = open_file();
            off_t from = 0;
            while (pread(file, got, MOST / 2, from) > 0)
                from = (from + MOST / 2) % (2 * MOST);
            _exit(1);
        }
        uint64_t before = sent_so_far();
        for (unsigned tries = 0; tries < 20000 && sent_so_far() < before + i; tries++)
            (void)poll(NULL, 0, 1);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        read_some(2, 1);
    }
    expect(!world.piped.failures, "a program that was killed counts as a failure");
}

static const struct {
    const char *name;
    void (*run)(void);
} scenarios[] = {
    {"right_bytes", right_bytes},
    {"what_has_no_room", what_has_no_room},
    {"nobody_waits", nobody_waits},
    {"failures_between", failures_between},
    {"descriptors_run_out", descriptors_run_out},
    {"not_by_a_socket", not_by_a_socket},
    {"programs_that_are_killed", programs_that_are_killed},
};

static void begin(const char *point)
{
    char options[128];
    world.point = point;
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        perror("a mount namespace");
        exit(2);
    }
    world.device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", world.device);
    mkdir(point, 0700);
    if (world.device < 0 || mount("piped", point, "fuse", MS_NOSUID | MS_NODEV, options)) {
        perror(point);
        exit(2);
    }
    pthread_mutex_init(&world.lock, NULL);
    world.content = malloc(SIZE);
    world.window = aligned_alloc(TM_PAGE, ROOM);
    for (size_t i = 0; i < SIZE; i++)
        world.content[i] = (uint8_t)(random() >> 7);
    piped_init(&world.piped, world.device, MOST);
    world.got = mmap(NULL, MOST, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (world.got == MAP_FAILED)
        exit(2);
    start_program(); /* before there is a thread */
    if (pthread_create(&world.thread, NULL, serve, NULL))
        exit(2);
}

static void give_up(int signal)
{
    static const char why[] = "FAIL: an answer never came\n";
    (void)signal;
    (void)!write(2, why, sizeof why - 1);
    _exit(1);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: piped DIRECTORY\n");
        return 2;
    }
    begin(argv[1]);
    signal(SIGALRM, give_up);
    alarm(20);
    for (unsigned n = 0; n < sizeof scenarios / sizeof *scenarios; n++) {
        scenario = scenarios[n].name;
        use(world.device, MOST);
        scenarios[n].run();
    }
    close(world.wishes);
    close(world.results);
    waitpid(world.program, NULL, 0);
    munmap(world.got, MOST);
    if (umount2(world.point, MNT_DETACH))
        perror(world.point);
    pthread_join(world.thread, NULL); /* the connection has ended with the mount */
    piped_free(&world.piped);
    free(world.content);
    free(world.window);
    rmdir(world.point);
    if (!failures)
        printf("piped: %zu scenarios\n", sizeof scenarios / sizeof *scenarios);
    return failures != 0;
}
