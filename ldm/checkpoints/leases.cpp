// Files mapped into memory under a lease (fcntl(2), F_SETLEASE), so that whoever wants to change one waits for us.
//
// A thread of the library's own hears of it from the kernel, moves the bytes into memory that no file is behind, at the
// addresses where they are, and ends the lease. Nothing here needs Python: the one who waits may be this very process,
// inside a call that lets no other Python code run.

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace {

constexpr size_t kChunk = 4 << 20;
constexpr int kWake = SIGURG;  // one that ends no process, if it should ever miss the thread that waits for it

struct Mapped {
  char* at;
  size_t size;
  int fd;
  bool leased;
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
std::vector<Mapped>& all = *new std::vector<Mapped>;  // never destroyed: the thread outlives what ends at exit
pid_t watcher = 0;  // of this process; 0 if it has none yet

// A chunk changes places in one step of the kernel's: who reads meanwhile sees no difference. What another thread
// writes in the millisecond between copy and change would be lost.
bool move(const Mapped& file) {
  const size_t page = sysconf(_SC_PAGESIZE), size = (file.size + page - 1) / page * page;
  for (size_t start = 0; start < size; start += kChunk) {
    const size_t length = std::min(kChunk, size - start);
    void* fresh = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return false;
    memcpy(fresh, file.at + start, length);
    if (mremap(fresh, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, file.at + start) == MAP_FAILED) return false;
  }
  return true;
}

void let_go(Mapped& file) {
  file.leased = false;
  if (move(file))
    fcntl(file.fd, F_SETLEASE, F_UNLCK);
  else
    fprintf(stderr, "ldm: no memory for %zu bytes of weights whose file is about to change\n", file.size);
}

void* serve(void* ready) {
  *static_cast<std::atomic<pid_t>*>(ready) = syscall(SYS_gettid);
  sigset_t wake;
  sigemptyset(&wake);
  sigaddset(&wake, kWake);
  for (;;) {
    int got;
    sigwait(&wake, &got);
    pthread_mutex_lock(&lock);
    for (Mapped& file : all)
      if (file.leased && fcntl(file.fd, F_GETLEASE) != F_RDLCK) let_go(file);
    pthread_mutex_unlock(&lock);
  }
}

// A child would share the mappings, but neither the thread nor the leases.
void before_fork() {
  pthread_mutex_lock(&lock);
  for (Mapped& file : all)
    if (file.leased) let_go(file);
}

void after_fork_here() { pthread_mutex_unlock(&lock); }

void after_fork_in_child() {
  watcher = 0;
  pthread_mutex_unlock(&lock);
}

// Start the thread, with the lock held. It takes no signal but the one that is meant for it.
int start() {
  static bool told = false;
  if (!told && pthread_atfork(before_fork, after_fork_here, after_fork_in_child)) return ENOMEM;
  told = true;
  sigset_t none, before;
  sigfillset(&none);
  pthread_sigmask(SIG_SETMASK, &none, &before);
  pthread_t thread;
  static std::atomic<pid_t> number;
  number = 0;
  const int failed = pthread_create(&thread, nullptr, serve, &number);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failed) return failed;
  pthread_detach(thread);
  while (!number) usleep(50);
  watcher = number;
  return 0;
}

int take_lease(int fd) {
  struct f_owner_ex owner = {F_OWNER_TID, watcher};
  if (fcntl(fd, F_SETSIG, kWake) || fcntl(fd, F_SETOWN_EX, &owner) || fcntl(fd, F_SETLEASE, F_RDLCK)) return errno;
  return 0;
}

}  // namespace

extern "C" {

// Forget a mapping and close its descriptor.
void ldm_unmap(void* at) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].at == at) {
      munmap(at, all[i].size);
      close(all[i].fd);  // and with it the lease
      all.erase(all.begin() + i);
      break;
    }
  pthread_mutex_unlock(&lock);
}

// Map `size` bytes of an open file, privately and writable, under a lease; every page is read in. Gives 0, or an error
// number: EAGAIN where somebody has the file open for writing, EACCES where it is another user's, EINVAL where the
// kernel or the file system has no leases, EFAULT where the disk does not give it.
int ldm_map(int number, size_t size, void** at) {
  const int fd = fcntl(number, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return errno;
  pthread_mutex_lock(&lock);
  int failed = watcher ? 0 : start();
  if (!failed) failed = take_lease(fd);
  void* where = failed ? MAP_FAILED : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  if (!failed && where == MAP_FAILED) failed = errno;
  if (!failed) all.push_back({static_cast<char*>(where), size, fd, true});
  pthread_mutex_unlock(&lock);  // the thread hears of a lease whose file it knows, for until here it had to wait
  if (failed) {
    close(fd);
    return failed;
  }
  posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED);
  if (madvise(where, size, MADV_POPULATE_READ)) {
    failed = errno;
    ldm_unmap(where);
    return failed;
  }
  *at = where;
  return 0;
}
}
