/* The agent: relays commands of the host to workers, and their output back, over a serial port. One loop, no
 * allocation, no fork: see init.c for who makes the workers. */
#include "protocol.h"
#include "tool.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* Twice as many as there are workers: the output of ended ones may still have to be read. */
enum { ROWS = 32, RECEIVED = CHUNK + (int)sizeof(struct frame) };

struct row {
    pid_t pid; /* 0: the row is free */
    int in, out, err, control; /* -1: closed */
    uint32_t id;    /* of the command, if one was given */
    bool given;     /* a command was given */
    bool ended;     /* the process has ended, with `status` */
    int32_t status;
    size_t pending, sent; /* input that waits, and how much of it was written */
    char input[CHUNK];
};

static struct row *rows; /* mapped by the agent only: everything static is locked in every worker as well */
static int port = -1;
static char *received; /* RECEIVED bytes, of which so many are there */
static size_t received_length;
static char *buffer; /* CHUNK bytes */

static void write_all(const void *data, size_t length)
{
    const char *at = data;
    while (length > 0) {
        ssize_t n = write(port, at, length);
        if (n > 0) {
            at += n;
            length -= (size_t)n;
        } else if (errno != EINTR) {
            struct pollfd ready = {.fd = port, .events = POLLOUT};
            poll(&ready, 1, 100);
        }
    }
}

static void send_frame(uint32_t id, uint32_t kind, const void *data, size_t length)
{
    struct frame header = {.length = (uint32_t)length, .id = id, .kind = kind};
    write_all(&header, sizeof header);
    write_all(data, length);
}

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Pass on what can be read now. */
static void relay(struct row *row, int *fd, uint32_t kind)
{
    /* Bounded, lest a chatty orphan that holds the pipe keep everybody else waiting. */
    for (int turn = 0; turn < 8 && *fd >= 0; turn++) {
        ssize_t n = read(*fd, buffer, CHUNK);
        if (n > 0)
            send_frame(row->id, kind, buffer, (size_t)n);
        else if (n == 0)
            shut(fd);
        else if (errno != EINTR)
            return;
    }
}

static void feed(struct row *row)
{
    if (row->pending == 0)
        return;
    ssize_t n = row->in < 0 ? -1 : write(row->in, row->input + row->sent, row->pending - row->sent);
    if (n < 0 && row->in >= 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n < 0)
        shut(&row->in); /* nobody reads it any more; the rest is dropped */
    else
        row->sent += (size_t)n;
    if (row->in < 0 || row->sent == row->pending) {
        row->pending = row->sent = 0;
        send_frame(row->id, TAKEN, NULL, 0);
    }
}

static void finish(struct row *row)
{
    relay(row, &row->out, OUTPUT);
    relay(row, &row->err, ERRORS);
    if (row->given)
        send_frame(row->id, ENDED, &row->status, sizeof row->status);
    shut(&row->in);
    shut(&row->out);
    shut(&row->err);
    shut(&row->control);
    row->pid = 0;
}

static struct row *find(uint32_t id)
{
    for (size_t i = 0; i < ROWS; i++)
        if (rows[i].pid != 0 && rows[i].given && rows[i].id == id)
            return &rows[i];
    return NULL;
}

static void run(uint32_t id, const char *command, size_t length)
{
    for (size_t i = 0; i < ROWS; i++) {
        struct row *row = &rows[i];
        if (row->pid == 0 || row->given || row->ended)
            continue;
        row->id = id;
        row->given = true;
        int32_t pid = row->pid;
        send_frame(id, STARTED, &pid, sizeof pid);
        /* Up to CHUNK bytes fit into the pipe, so this does not wait. */
        if (write(row->control, command, length) != (ssize_t)length)
            kill(row->pid, SIGKILL);
        shut(&row->control);
        return;
    }
    send_frame(id, BUSY, NULL, 0);
}

static void obey(const struct frame *header, const char *data)
{
    struct row *row = find(header->id);
    switch (header->kind) {
    case RUN:
        run(header->id, data, header->length);
        break;
    case INPUT:
        if (row == NULL)
            break;
        if (header->length == 0) {
            shut(&row->in);
        } else {
            memcpy(row->input, data, header->length);
            row->pending = header->length;
            feed(row);
        }
        break;
    case SIGNAL:
        if (row != NULL && !row->ended && header->length == 1)
            kill(-row->pid, data[0]);
        break;
    case PING:
        send_frame(header->id, PONG, NULL, 0);
        break;
    default: /* of a newer host: not ours to judge */
        break;
    }
}

static void listen_to_host(void)
{
    ssize_t n = read(port, received + received_length, RECEIVED - received_length);
    if (n <= 0) {
        /* Nobody is connected at the other end. */
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
        return;
    }
    received_length += (size_t)n;
    size_t at = 0;
    struct frame header;
    while (received_length - at >= sizeof header) {
        memcpy(&header, received + at, sizeof header);
        if (header.length > CHUNK) {
            fprintf(stderr, "guest-tool: the host sent nonsense\n");
            exit(2);
        }
        if (received_length - at < sizeof header + header.length)
            break;
        obey(&header, received + at + sizeof header);
        at += sizeof header + header.length;
    }
    memmove(received, received + at, received_length - at);
    received_length -= at;
}

static void adopt(pid_t pid, const int *descriptors)
{
    for (size_t i = 0; i < ROWS; i++)
        if (rows[i].pid == 0) {
            struct row *row = &rows[i];
            row->pid = pid;
            row->in = descriptors[0];
            row->out = descriptors[1];
            row->err = descriptors[2];
            row->control = descriptors[3];
            row->given = row->ended = false;
            row->pending = row->sent = 0;
            fcntl(row->in, F_SETFL, O_NONBLOCK);
            fcntl(row->out, F_SETFL, O_NONBLOCK);
            fcntl(row->err, F_SETFL, O_NONBLOCK);
            return;
        }
    for (size_t i = 0; i < 4; i++)
        close(descriptors[i]);
}

static void listen_to_nursery(int nursery)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct notice notice;
    struct iovec part = {.iov_base = &notice, .iov_len = sizeof notice};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (recvmsg(nursery, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != (ssize_t)sizeof notice)
        return;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (notice.kind == READY && header != NULL) {
        int descriptors[4];
        memcpy(descriptors, CMSG_DATA(header), sizeof descriptors);
        adopt(notice.pid, descriptors);
    }
    if (notice.kind == GONE)
        for (size_t i = 0; i < ROWS; i++)
            if (rows[i].pid == notice.pid && !rows[i].ended) {
                rows[i].ended = true;
                rows[i].status = notice.status;
                finish(&rows[i]);
            }
}

/* Open the port: named on the kernel's command line (a terminal), or the virtio port of our name. */
static int open_port(void)
{
    const char *given = getenv("GUEST_PORT");
    if (given != NULL) {
        int fd = open(given, O_RDWR | O_CLOEXEC | O_NOCTTY);
        struct termios settings;
        if (fd >= 0 && tcgetattr(fd, &settings) == 0) {
            cfmakeraw(&settings);
            tcsetattr(fd, TCSANOW, &settings);
        }
        return fd;
    }
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int fd = -1;
    while (ports != NULL && fd < 0 && (entry = readdir(ports)) != NULL) {
        char path[300], name[32] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0) {
            if (read(file, name, sizeof name - 1) > 0 && strncmp(name, "tmem.guest", 10) == 0) {
                snprintf(path, sizeof path, "/dev/%s", entry->d_name);
                fd = open(path, O_RDWR | O_CLOEXEC);
            }
            close(file);
        }
    }
    if (ports != NULL)
        closedir(ports);
    return fd;
}

int agent_main(int nursery)
{
    struct pollfd polled[2 + 3 * ROWS];
    size_t size = ROWS * sizeof *rows + RECEIVED + CHUNK;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    rows = (struct row *)memory;
    received = memory + ROWS * sizeof *rows;
    buffer = received + RECEIVED;
    signal(SIGPIPE, SIG_IGN);
    if ((port = open_port()) < 0)
        die("the port to the host");
    send_frame(0, HELLO, NULL, 0);
    for (;;) {
        polled[0] = (struct pollfd){.fd = port, .events = POLLIN};
        polled[1] = (struct pollfd){.fd = nursery, .events = POLLIN};
        for (size_t i = 0; i < ROWS; i++) {
            bool used = rows[i].pid != 0 && rows[i].given;
            struct pollfd *mine = &polled[2 + 3 * i];
            mine[0] = (struct pollfd){.fd = used ? rows[i].out : -1, .events = POLLIN};
            mine[1] = (struct pollfd){.fd = used ? rows[i].err : -1, .events = POLLIN};
            mine[2] = (struct pollfd){.fd = used && rows[i].pending > 0 ? rows[i].in : -1, .events = POLLOUT};
        }
        if (poll(polled, 2 + 3 * ROWS, -1) < 0)
            continue;
        for (size_t i = 0; i < ROWS; i++) {
            struct pollfd *mine = &polled[2 + 3 * i];
            if (mine[0].revents)
                relay(&rows[i], &rows[i].out, OUTPUT);
            if (mine[1].revents)
                relay(&rows[i], &rows[i].err, ERRORS);
            if (mine[2].revents)
                feed(&rows[i]);
        }
        if (polled[1].revents)
            listen_to_nursery(nursery);
        if (polled[0].revents)
            listen_to_host();
    }
}
