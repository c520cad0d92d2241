/* Process 1: the nursery. It keeps workers forked ahead, each waiting for one command to become, so that a command
 * costs no fork of the agent's, who must answer even when a fork would wait for memory. It also reaps orphans. */
#include "protocol.h"
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { WORKERS = 16, ARGUMENTS = 512 };

static pid_t workers[WORKERS]; /* 0: none */
static int agent_socket = -1;

/* Wait for a command and become it. Everything but the four descriptors closes on exec. */
static _Noreturn void work(int in, int out, int err, int control)
{
    static char command[CHUNK + 1];
    char *arguments[ARGUMENTS + 1];
    int count = 0;
    mlockall(MCL_CURRENT);
    ssize_t length = 0, n;
    while ((n = read(control, command + length, CHUNK - (size_t)length)) > 0)
        length += n;
    if (length == 0)
        _exit(0);
    for (char *at = command; at < command + length && count < ARGUMENTS; at += strlen(at) + 1)
        arguments[count++] = at;
    arguments[count] = NULL;
    put_text("/proc/self/oom_score_adj", "0");
    dup2(in, 0);
    dup2(out, 1);
    dup2(err, 2);
    execvp(arguments[0], arguments);
    dprintf(2, "%s: %s\n", arguments[0], strerror(errno));
    _exit(127);
}

static void tell_agent(struct notice notice, const int *descriptors, size_t count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(4 * sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec part = {.iov_base = &notice, .iov_len = sizeof notice};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
    }
    while (sendmsg(agent_socket, &message, MSG_NOSIGNAL) < 0 && (errno == EINTR || errno == ENOBUFS)) {
    }
}

/* Fork the worker of a row, trying until there is memory for it. */
static void spawn(size_t row)
{
    int in[2], out[2], err[2], control[2];
    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC) || pipe2(control, O_CLOEXEC))
        die("pipe");
    pid_t pid;
    while ((pid = fork()) < 0)
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    if (pid == 0) {
        /* Or the worker would keep the ends open that the agent must see closed. */
        close(in[1]);
        close(out[0]);
        close(err[0]);
        close(control[1]);
        close(agent_socket);
        work(in[0], out[1], err[1], control[0]);
    }
    setpgid(pid, pid); /* here and before anybody knows of it, so that a signal for its group finds it at any time */
    workers[row] = pid;
    close(in[0]);
    close(out[1]);
    close(err[1]);
    close(control[0]);
    int descriptors[4] = {in[1], out[0], err[0], control[1]};
    tell_agent((struct notice){.kind = READY, .pid = pid}, descriptors, 4);
    for (size_t i = 0; i < 4; i++)
        close(descriptors[i]);
}

int init_main(void)
{
    int pair[2];
    const char *first = getenv("GUEST_PATH");
    char path[512];
    snprintf(path, sizeof path, "%s%s/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", first ? first : "",
             first ? ":" : "");
    setenv("PATH", path, 1);
    setenv("HOME", "/root", 1);
    setenv("LANG", "C.UTF-8", 1);
    setenv("TERM", "dumb", 1);
    become_unswappable();
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        die("socketpair");
    pid_t agent = fork();
    if (agent < 0)
        die("fork");
    if (agent == 0) {
        close(pair[0]);
        become_unswappable(); /* locks and the class of the parent are not inherited */
        _exit(agent_main(pair[1]));
    }
    close(pair[1]);
    agent_socket = pair[0];
    for (size_t row = 0; row < WORKERS; row++)
        spawn(row);
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, 0);
        if (pid == agent)
            return 1; /* a panic, which the host sees */
        for (size_t row = 0; row < WORKERS; row++)
            if (pid > 0 && workers[row] == pid) {
                tell_agent((struct notice){.kind = GONE, .pid = pid, .status = status}, NULL, 0);
                spawn(row);
                break;
            }
    }
}
